"""What a trained run leans on: asked again with parts of its input taken away, exchanged or changed."""
