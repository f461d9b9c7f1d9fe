"""Skin-lesion classification from a photograph and the patient's metadata: DualRefNet and honest measurement."""

__version__ = "0.1.0"
