"""Encoders, decoders and fusion models behind one contract: `forward(image, metadata) -> Output`."""
