"""The state of a training between two epochs, in one safetensors file: tensors, and everything else as JSON in its header.

One file, replaced atomically: whenever the process dies, what lies on disk is the end of some whole epoch.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor, nn, optim

from dualrefnet.errors import RunError
from dualrefnet.files import write_tensors

FORMAT = 1


def save_checkpoint(path: Path, model: nn.Module, optimizer: optim.Optimizer, progress: dict[str, Any]) -> None:
    """Write the state after an epoch.

    Args:
        path: the file.
        model: the bare model, not a wrapper.
        optimizer: its optimizer.
        progress: plain JSON values: the next epoch, the history, the scheduler's state.
    """
    state = optimizer.state_dict()
    tensors: dict[str, Tensor] = {f"model/{name}": value for name, value in model.state_dict().items()}
    numbers: dict[str, dict[str, Any]] = {}
    for index, slots in state["state"].items():
        for name, value in slots.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer/{index}/{name}"] = value
            else:
                numbers.setdefault(str(index), {})[name] = value
    header = {"format": FORMAT, "progress": progress, "groups": state["param_groups"], "numbers": numbers}
    write_tensors(path, tensors, {"state": json.dumps(header)})


def load_checkpoint(path: Path, model: nn.Module, optimizer: optim.Optimizer) -> dict[str, Any]:
    """Put a saved state into a model and an optimizer, and return the progress.

    Raises:
        RunError: the file is damaged or of another format.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            header = json.loads(file.metadata()["state"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except Exception as error:
        raise RunError(f"{path} can't be read ({error}); delete it to train from the beginning") from error
    if header["format"] != FORMAT:
        raise RunError(f"{path} was written by another version of dualrefnet; train from the beginning in another folder")
    model.load_state_dict({name.removeprefix("model/"): value for name, value in tensors.items() if name.startswith("model/")})
    slots: dict[int, dict[str, Any]] = {int(index): dict(values) for index, values in header["numbers"].items()}
    for name, value in tensors.items():
        if name.startswith("optimizer/"):
            _, index, slot = name.split("/")
            slots.setdefault(int(index), {})[slot] = value
    optimizer.load_state_dict({"state": slots, "param_groups": header["groups"]})
    return header["progress"]  # type: ignore[no-any-return]
