"""What a form may hold, as JSON Schema, for programs that send one."""

# also: From a trained run to a bundle: one folder that answers without torch, and says what it is.

from __future__ import annotations

import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata as packages
from pathlib import Path
from typing import Any

import torch

import dualrefnet
from dualrefnet.analysis.opened_run import open_run
from dualrefnet.data.metadata import MetadataEncoder
from dualrefnet.deploy import hub
from dualrefnet.deploy.card import data_licence, model_card
from dualrefnet.deploy.gate import refuse_shortcut
from dualrefnet.deploy.network import ExportedModel, ProgramNetwork, TorchNetwork, trace, write_onnx, write_program
from dualrefnet.deploy.parity import (
    BATCH,
    SETTING,
    Cases,
    check_parity,
    drawn_cases,
    measure_int8,
    quantise,
    real_cases,
)
from dualrefnet.deploy.predictor import described_dataset
from dualrefnet.errors import DataError, RunError
from dualrefnet.files import sha256_of_file, write_json, write_text
from dualrefnet.models.base import Architecture, Method
from dualrefnet.models.registry import load_model
from dualrefnet.progress import progress_bar, remark, warn
from dualrefnet.recipe import ImageSection
from dualrefnet.run import Run
from dualrefnet.runtime.availability import missingness_shortcut
from dualrefnet.runtime.bundle import FORMAT, OnnxNetwork
from dualrefnet.runtime.classifier import Network


def form_schema(metadata: MetadataEncoder, name: str, reads_metadata: bool = True) -> dict[str, Any]:
    """Return the JSON Schema (2020-12) of a form.

    Args:
        metadata: the fitted encoder.
        name: of the model.
        reads_metadata: False: the model asks nothing, whatever the encoder knows.
    """
    questions = {}
    asked = zip(metadata.fields, metadata.categories, strict=True) if reads_metadata else ()
    for one, levels in asked:
        said = one.description or one.name.replace("_", " ")
        question: dict[str, Any] = {"description": f"{said}, in {one.unit}" if one.unit else said}
        if one.unit:
            question["unit"] = one.unit
        if one.kind == "numeric":
            limits = {"minimum": one.minimum, "maximum": one.maximum}
            number = {"type": "number", **{key: value for key, value in limits.items() if value is not None}}
            question["anyOf"] = [number, {"enum": [*one.missing_codes, None]}]
        else:
            words: list[str | bool] = list(dict.fromkeys([*levels, *one.aliases, *one.missing_codes]))
            if one.kind == "boolean":
                words = [True, False, *(word for word in words if word not in ("True", "False"))]
            # Categories that are whole numbers, such as skin types, may be sent as such.
            question["enum"] = [
                *words,
                *(int(word) for word in words if isinstance(word, str) and word.isdecimal()),
                None,
            ]
        questions[one.name] = question
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"Form of {name}",
        "description": "A patient's answers. None is compulsory; null means the same as leaving the question out.",
        "type": "object",
        "properties": questions,
        "additionalProperties": False,
    }


# The largest difference between a probability of torch and one of onnxruntime that is taken for rounding.
LIMIT = 1e-3


VALIDATION, TRAINING, DRAWN = 300, 256, 64


NOTICE = "Not a medical device. For research and teaching."


@dataclass(frozen=True)
class _Material:
    """What networks are compared on.

    Attributes:
        cases: of the validation side, or drawn.
        training: of the training side, for int8; None without the run's photographs.
        checked_on: what `cases` are, in words.
    """

    cases: Cases
    training: Cases | None
    checked_on: str


def export_run(
    run: Run,
    out: Path,
    int8: bool | None = None,
    root: Path | None = None,
    cache: Path | None = None,
    accept_missingness_shortcut: bool = False,
) -> dict[str, Any]:
    """Write the bundle of a finished run.

    Args:
        run: the run; its best epoch is exported.
        out: the bundle's folder; replaced if it is a bundle already.
        int8: write the 8-bit network too; None: if the run's photographs are at hand.
        root: where the data lie now, if not where the recipe says.
        cache: where image stores lie.
        accept_missingness_shortcut: export it though blank metadata keep it from referring cancers; the bundle then
            warns of it.

    Returns:
        The content of `bundle.json`.

    Raises:
        RunError: the run isn't finished, mustn't be used by anybody (see `refuse_shortcut`), `out` holds something
            else, or the exported
            network doesn't answer as the trained one does.
        DataError: `root` doesn't hold the run's data, or int8 was asked for and they aren't at hand.
        DependencyError: an optional library is missing.
    """
    check_target(out)
    if not run.finished:
        raise RunError(
            f"{run.path} isn't finished: `dualrefnet train ... --resume` goes on, `dualrefnet evaluate {run.path}` measures it"
        )
    refuse_shortcut(missingness_shortcut(run.metrics), run.path, accept_missingness_shortcut)
    description = run.model
    metadata = MetadataEncoder.from_json(description["metadata"])
    if metadata.leaked_classes:
        raise RunError(
            f"{run.path} fills gaps of the form from the diagnosis, a demonstration of that leak: nobody could use its bundle"
        )
    method = load_model(description, run.weights_file).eval()
    if int8 and not method.reads_image:
        raise RunError("int8 is for image encoders, and this model reads no image; export it with --no-int8")
    image = ImageSection.model_validate(description["preprocessing"]["image"])
    material = _material(
        run, root, cache, image if method.reads_image else None, metadata, int8 is not False and method.reads_image
    )
    if int8 and material.training is None:
        raise DataError(
            "int8 learns its ranges from training photographs and is measured on validation photographs, and the run's data aren't at "
            "hand: say where they are with --root DIR, or export with --no-int8"
        )
    with new_folder(out) as folder:
        bundle = _fill(folder, run, method, image, metadata, material, int8)
    remark(f"the bundle is in {out}")
    return bundle


def check_target(out: Path) -> None:
    """Refuse a place where something lies that isn't a bundle.

    Raises:
        RunError: it is a file, or a folder that holds something else.
    """
    if out.exists() and not out.is_dir():
        raise RunError(f"{out} is a file; name a folder for the bundle with --out")
    if out.is_dir() and any(out.iterdir()) and not hub.is_bundle(out):
        raise RunError(f"{out} isn't empty and isn't a bundle; name another folder with --out")


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Give an empty neighbour of a folder, and put it in the folder's place if the block ends without an error."""
    out.parent.mkdir(parents=True, exist_ok=True)
    word = secrets.token_hex(4)
    made, old = (out.with_name(f".{out.name}.{word}.{what}") for what in ("partial", "old"))
    made.mkdir()
    try:
        yield made
        if out.is_dir():
            out.rename(old)
        try:
            made.rename(out)
        except OSError:
            if old.is_dir():
                old.rename(out)
            raise
    finally:
        shutil.rmtree(made, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _material(
    run: Run,
    root: Path | None,
    cache: Path | None,
    image: ImageSection | None,
    metadata: MetadataEncoder,
    training: bool,
) -> _Material:
    """Read photographs and forms of the run's data; draw some, and say so, if they aren't at hand."""
    try:
        opened = open_run(run, root, cache=cache, device=torch.device("cpu"))
    except (DataError, RunError) as error:
        # A folder that was named and is wrong is a mistake, not a lack.
        if root is not None:
            raise
        warn(
            f"the run's data aren't at hand ({error}). Parity is checked on drawn pictures instead, and int8 could neither learn its "
            "ranges from real photographs nor be measured"
        )
        return _Material(
            drawn_cases(DRAWN, image, metadata), None, "on drawn pictures, since the run's photographs weren't at hand"
        )
    size = opened.recipe.image.size
    cases = real_cases(opened.pictures("val"), size, VALIDATION)
    learn = real_cases(opened.pictures("train"), size, TRAINING) if training else None
    return _Material(cases, learn, "on validation cases of the run")


def _fill(
    folder: Path,
    run: Run,
    method: Method,
    image: ImageSection,
    metadata: MetadataEncoder,
    material: _Material,
    int8: bool | None,
) -> dict[str, Any]:
    """Write all files of the bundle, and return the content of `bundle.json`."""
    description = run.model
    normalisation = (tuple(description["preprocessing"]["mean"]), tuple(description["preprocessing"]["std"]))
    trained = TorchNetwork(method, image.size, normalisation, torch.device("cpu"))
    model = ExportedModel(method, Architecture.model_validate(description["architecture"]), normalisation)
    float32 = _write_networks(folder, model, trained, material)
    networks = {"float32": float32}
    reason = None if method.reads_image else "this model reads no photograph"
    reason = reason or ("it wasn't asked for" if int8 is False else None)
    reason = reason or ("the run's photographs weren't at hand" if material.training is None else None)
    if reason is None:
        assert material.training is not None
        networks["int8"] = _write_int8(folder, run, material.cases, material.training, tuple(description["classes"]))
    if method.reads_image and run.out_of_scope_file.is_file():
        shutil.copyfile(run.out_of_scope_file, folder / run.out_of_scope_file.name)
    dataset, class_names = described_dataset(description["dataset"])
    versions = {name: packages.version(name) for name in ("torch", "onnx", "onnxscript", "onnxruntime")}
    bundle = {
        "format": FORMAT,
        "dualrefnet": dualrefnet.__version__,
        "name": run.recipe.name,
        "method": run.recipe.model.method,
        "dataset": dataset,
        "classes": description["classes"],
        "class_names": class_names,
        "malignant": description["malignant"],
        "image": description["preprocessing"]["image"],
        "metadata": description["metadata"],
        "calibration": run.calibration.to_json() if run.calibration_file.is_file() else None,
        "learned_tokens": not method.needs_image,
        "reads_image": bool(method.reads_image),
        "reads_metadata": bool(method.reads_metadata),
        "networks": networks,
        "no_int8": reason,
        "missingness_shortcut": missingness_shortcut(run.metrics),
        "measured": run.metrics,
        "exported_with": {"dualrefnet": dualrefnet.__version__, **versions},
    }
    write_json(folder / "form.schema.json", form_schema(metadata, bundle["name"], method.reads_metadata))
    hub.copy_runtime(folder)
    write_text(folder / "DATA_LICENCE.md", data_licence(dataset))
    names = [name for name in hub.FILES if (folder / name).is_file()]
    write_text(folder / "README.md", model_card(bundle, run, [*names, hub.DESCRIPTION, f"{hub.RUNTIME}/"]))
    # Written last: a folder is a bundle if this is there.
    write_json(folder / hub.DESCRIPTION, bundle)
    return bundle


def _write_networks(folder: Path, model: ExportedModel, trained: Network, material: _Material) -> dict[str, Any]:
    """Write the ONNX file and the program of torch, compare both with the trained network, and describe the former.

    Raises:
        RunError: one of them answers otherwise.
    """
    onnx_file, program_file = folder / "model.onnx", folder / "model.pt2"
    remark("tracing the network and writing it as ONNX; half a minute, of large encoders some minutes")
    program = trace(model)
    write_onnx(program, model, onnx_file, {"dualrefnet": dualrefnet.__version__, "notice": NOTICE})
    write_program(program, program_file)
    tokens = not model.method.needs_image
    with progress_bar("comparing with torch") as show:
        parity = check_parity(trained, OnnxNetwork(onnx_file), material.cases, tokens, show)
    few = material.cases.part(0, BATCH)
    for name, found in (
        ("ONNX", parity),
        ("torch.export", check_parity(trained, ProgramNetwork(program_file, model.inputs), few, tokens)),
    ):
        if not found.largest <= LIMIT:
            raise RunError(
                f"the {name} file doesn't answer as the trained model does: a probability differs by {found.largest:.2g}, and "
                f"{LIMIT:g} is the limit. Nothing was written. Please report this, with the recipe and the versions of `dualrefnet doctor`"
            )
    remark(
        f"parity: the probabilities of model.onnx differ from torch's by {parity.largest:.1e} at most, {material.checked_on}"
    )
    return {
        "file": onnx_file.name,
        "sha256": sha256_of_file(onnx_file),
        "bytes": onnx_file.stat().st_size,
        "parity": {**parity.to_json(), "limit": LIMIT, "checked_on": material.checked_on},
        "inputs": [model.describe(name) for name in model.inputs],
        "outputs": [model.describe(name) for name in model.outputs],
    }


def _write_int8(folder: Path, run: Run, cases: Cases, training: Cases, classes: tuple[str, ...]) -> dict[str, Any]:
    """Write the 8-bit network, measure it on validation cases, say what it is worth, and describe it."""
    file = folder / "model.int8.onnx"
    with progress_bar("int8: learning ranges") as show:
        quantise(folder / "model.onnx", file, training, show)
    check = run.out_of_scope if run.out_of_scope_file.is_file() else None
    with progress_bar("int8: measuring") as show:
        measured, verdict, worth_it = measure_int8(
            OnnxNetwork(folder / "model.onnx"), OnnxNetwork(file), cases, classes, check, show
        )
    (remark if worth_it else warn)(f"int8: {verdict}")
    return {
        "file": file.name,
        "sha256": sha256_of_file(file),
        "bytes": file.stat().st_size,
        "setting": SETTING,
        "calibrated_on": len(training),
        "measured": measured,
        "verdict": verdict,
    }
