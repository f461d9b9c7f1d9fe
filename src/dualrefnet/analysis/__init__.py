"""What a trained run sees, leans on and fails at: each subject is measured and drawn in one file."""
