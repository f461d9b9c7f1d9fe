"""Gradio, made to keep everything to itself before it is loaded."""

from __future__ import annotations

import os

from dualrefnet.errors import DependencyError

# Gradio reads these when it is imported and later: nothing is told to anyone, and no newer version is asked for.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
try:
    import gradio as gradio
except ImportError:
    raise DependencyError("the page needs gradio: pip install 'dualrefnet[deploy]'") from None

__all__ = ["gradio"]
