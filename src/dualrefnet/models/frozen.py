"""Frozen encoders: what they make of every picture is computed once, and the rest of a method is trained on it.

The comparison of fusion methods then takes seconds a run. The encoder learns nothing about skin, there is no
augmentation, and the auxiliary task has no effect: numbers of frozen runs are a comparison of fusions, not of systems.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from dualrefnet.data.derived_store import Arrays, DerivedStore, Part, fill_derived_store
from dualrefnet.data.image_store import ImageStore
from dualrefnet.models.backbones import Encoder
from dualrefnet.models.inference import normalise, to_unit
from dualrefnet.models.method import Method
from dualrefnet.progress import progress_bar
from dualrefnet.recipe import Recipe


def fill_features(recipe: Recipe, model: Method, store: ImageStore, device: torch.device) -> tuple[DerivedStore, ...]:
    """Return what each encoder of a model makes of every picture; computed once for all runs that share encoder and pictures.

    Args:
        recipe: the run's.
        model: with encoders that are not trained.
        store: the pictures, of the input's size.
        device: where to compute.

    Raises:
        DataError: the disk has no room.
    """
    keep_map, size = model.maps(recipe.model), recipe.image.size
    stores = []
    for module in model.encoders:
        assert isinstance(module, Encoder)
        stores.append(_fill(module, store, size, keep_map, device))
    return tuple(stores)


def _fill(encoder: Encoder, store: ImageStore, size: int, keep_map: bool, device: torch.device) -> DerivedStore:
    encoder.to(device).eval()

    @torch.inference_mode()
    def compute(pictures: NDArray[np.uint8]) -> Arrays:
        images = torch.from_numpy(pictures).permute(0, 3, 1, 2).to(device)
        output = encoder(normalise(to_unit(images, size), (encoder.mean, encoder.std)))
        values = {"vector": output.vector.float().cpu().numpy()}
        if keep_map and output.map is not None:
            values["map"] = output.map.half().cpu().numpy()
        return values | {f"tap{number}": tap.half().cpu().numpy() for number, tap in enumerate(output.taps)}

    shapes = {name: value.shape[1:] for name, value in compute(np.zeros((1, size, size, 3), dtype=np.uint8)).items()}
    # Half precision is enough for maps, which are large, and of which the mean or a weighted mean is taken.
    parts = {name: Part("float32" if name == "vector" else "float16", shape) for name, shape in shapes.items()}
    settings = {"encoder": encoder.name, "parameters": _fingerprint(encoder), "size": size, "parts": sorted(parts)}
    settings |= {"mean": list(encoder.mean), "std": list(encoder.std)}
    with progress_bar(f"features of {encoder.name}") as show:
        return fill_derived_store(store, f"features-{encoder.name}", settings, parts, compute, progress=show)


def _fingerprint(module: nn.Module) -> str:
    """Return the SHA-256 of all parameters and buffers, so that only the same encoder finds its features again."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
