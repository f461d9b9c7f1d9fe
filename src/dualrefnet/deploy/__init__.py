"""From a finished run to predictions; imports nothing of the training."""
