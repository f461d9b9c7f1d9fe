"""A model in an ONNX file, computed by onnxruntime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from .classifier import Answered

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


class OnnxNetwork:
    """Computes a model that was exported; see `Network`.

    Attributes:
        session: of onnxruntime.
    """

    def __init__(self, file: Path, device: str = "cpu", threads: int | None = None) -> None:
        """Load the model.

        Args:
            file: the ONNX file.
            device: cpu or cuda.
            threads: that compute one answer; None: one a core.

        Raises:
            ValueError: the device isn't one of these, or this onnxruntime can't use it.
            OSError: there is no such file, or it isn't an ONNX model.
        """
        provider = PROVIDERS.get(device.split(":")[0])
        if provider is None or provider not in onnxruntime.get_available_providers():
            raise ValueError(
                f"this onnxruntime can't compute on {device!r}; it has: {', '.join(onnxruntime.get_available_providers())} "
                "(for a GPU: pip install onnxruntime-gpu)"
            )
        if not file.is_file():
            raise FileNotFoundError(f"there is no {file}")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or 0
        # Threads that wait for each other inside an answer spin, which is faster than sleeping. After it they would go on spinning, and
        # burn the cores on which the next photographs are being decoded.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        options.log_severity_level = 3
        try:
            self.session = onnxruntime.InferenceSession(str(file), options, providers=[provider])
        except Exception as error:  # onnxruntime's own errors have no common base.
            raise OSError(f"{file} can't be loaded: {str(error).splitlines()[0][:200]}") from None
        self._inputs = {one.name for one in self.session.get_inputs()}
        self._outputs = [one.name for one in self.session.get_outputs()]

    def __call__(self, images: NDArray[np.uint8] | None, absent: NDArray[np.bool_] | None, forms: NDArray[np.float32]) -> Answered:
        """Answer; see `Network`."""
        given: dict[str, Any] = {"image": images, "absent": absent, "metadata": forms}
        found = dict(zip(self._outputs, self.session.run(None, {name: given[name] for name in self._inputs}), strict=True))
        return Answered(found["logits"], found.get("vector"))
