"""Losses, the training loop and its resumption."""
