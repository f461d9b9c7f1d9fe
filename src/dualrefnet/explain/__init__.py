"""What the model sees: where it looks, which answers of the form count, what its features separate."""
