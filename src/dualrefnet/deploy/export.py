"""From a trained run to a bundle: a folder that predicts without torch, and documents itself."""

from __future__ import annotations

import shutil
from importlib import metadata as packages
from pathlib import Path
from typing import Any

import torch

import dualrefnet
from dualrefnet.analysis.opened_run import open_run
from dualrefnet.data.metadata import MetadataEncoder
from dualrefnet.deploy import hub
from dualrefnet.deploy.card import data_licence, model_card
from dualrefnet.deploy.network import (
    ExportedModel,
    ProgramNetwork,
    normalisation_of,
    run_parts,
    trace,
    write_onnx,
    write_program,
)
from dualrefnet.deploy.parity import (
    BATCH,
    SETTING,
    Cases,
    check_parity,
    measure_int8,
    quantise,
    real_cases,
    synthetic_cases,
)
from dualrefnet.deploy.predictor import refuse_shortcut
from dualrefnet.errors import DataError, RunError
from dualrefnet.files import atomic_folder, sha256_of_file, write_json, write_text
from dualrefnet.models.base import Architecture
from dualrefnet.models.registry import trained_on
from dualrefnet.progress import note, warn
from dualrefnet.recipe import ImageSection
from dualrefnet.run import Run
from dualrefnet.runtime.availability import missingness_shortcut
from dualrefnet.runtime.bundle import DESCRIPTION, FORMAT, SCORE, SUMS, OnnxNetwork
from dualrefnet.runtime.classifier import Network

# The largest difference between a probability of torch and one of onnxruntime that is taken for rounding.
LIMIT = 1e-3
VALIDATION, TRAINING, SYNTHETIC = 300, 256, 64
NOTICE = "Not a medical device. For research and teaching."


def export_run(
    run: Run,
    out: Path,
    int8: bool | None = None,
    root: Path | None = None,
    cache: Path | None = None,
    accept_missingness_shortcut: bool = False,
) -> dict[str, Any]:
    """Write the bundle of a finished run's best epoch, and return the content of `bundle.json`.

    `int8`: the int8 network too; None: if the run's images are available.
    """
    check_target(out)
    if not run.finished:
        raise RunError(
            f"{run.path} isn't finished: `dualrefnet train ... --resume` goes on, `dualrefnet evaluate {run.path}` "
            "measures it"
        )
    shortcut = missingness_shortcut(run.metrics)
    refuse_shortcut(shortcut, run.path, accept_missingness_shortcut)
    about, parts = run.model, run_parts(run, "cpu")
    description, image, metadata = parts["description"], parts["image"], parts["encoder"]
    method, reads_image = parts["network"].model, parts["reads_image"]
    if metadata.leaked_classes:
        raise RunError(
            f"{run.path} imputes metadata from the diagnosis, a demonstration of that leak: nobody can use it"
        )
    if int8 and not reads_image:
        raise RunError("int8 is for image encoders, and this model reads no image; export it with --no-int8")
    validation, training, checked_on = _cases(run, root, cache, image if reads_image else None, metadata, int8)
    no_int8 = None
    if not reads_image:
        no_int8 = "this model reads no image"
    elif int8 is False:
        no_int8 = "it wasn't asked for"
    elif training is None:
        no_int8 = "the run's images weren't available"
        if int8:
            raise DataError(
                "int8 is calibrated on training images and measured on validation images, and the run's data aren't "
                "available: name their folder with --root DIR, or export with --no-int8"
            )
    versions = {name: packages.version(name) for name in ("torch", "onnx", "onnxscript", "onnxruntime")}
    with atomic_folder(out) as folder:
        model = ExportedModel(method, Architecture.model_validate(about["architecture"]), normalisation_of(about))
        networks = {"float32": _write_float32(folder, model, parts["network"], validation, checked_on)}
        if no_int8 is None and training is not None:
            networks["int8"] = _write_int8(folder, run, validation, training)
        if parts["out_of_scope"] is not None:
            shutil.copyfile(run.out_of_scope_file, folder / SCORE)
        bundle = {
            "format": FORMAT,
            "dualrefnet": dualrefnet.__version__,
            "name": run.recipe.name,
            "method": run.recipe.model.method,
            "dataset": description["dataset"],
            "trained_on": trained_on(about["weights"]),
            "classes": about["classes"],
            "class_names": description["class_names"],
            "malignant": about["malignant"],
            "image": about["preprocessing"]["image"],
            "metadata": about["metadata"],
            "calibration": None if parts["decision"] is None else parts["decision"].to_json(),
            **{name: parts[name] for name in ("learned_tokens", "reads_image", "reads_metadata")},
            "networks": networks,
            "no_int8": no_int8,
            "missingness_shortcut": shortcut,
            "measured": run.metrics,
            "exported_with": {"dualrefnet": dualrefnet.__version__, **versions},
        }
        write_json(folder / "form.schema.json", metadata_schema(metadata, run.recipe.name, parts["reads_metadata"]))
        write_json(folder / DESCRIPTION, bundle)
        hub.copy_runtime(folder)
        write_text(folder / "DATA_LICENCE.md", data_licence(description["dataset"], bundle["trained_on"]))
        names = [name for name in hub.FILES if (folder / name).is_file()]
        write_text(folder / "README.md", model_card(bundle, run, [*names, SUMS, f"{hub.RUNTIME}/"]))
        hub.write_sums(folder)
    note(f"the bundle is in {out}")
    return bundle


def metadata_schema(metadata: MetadataEncoder, name: str, reads_metadata: bool = True) -> dict[str, Any]:
    """Return the JSON Schema (2020-12) of the metadata that a model takes; `name` is the model's."""
    properties = {}
    for field, categories in zip(metadata.fields, metadata.categories, strict=True) if reads_metadata else ():
        text = field.description or field.name.replace("_", " ")
        about: dict[str, Any] = {"description": f"{text}, in {field.unit}" if field.unit else text}
        if field.unit:
            about["unit"] = field.unit
        if field.kind == "numeric":
            limits = {"minimum": field.minimum, "maximum": field.maximum}
            number = {"type": "number", **{key: value for key, value in limits.items() if value is not None}}
            about["anyOf"] = [number, {"enum": [*field.missing_codes, None]}]
        else:
            words: list[str | bool] = list(dict.fromkeys([*categories, *field.aliases, *field.missing_codes]))
            if field.kind == "boolean":
                words = [True, False, *(word for word in words if word not in ("True", "False"))]
            # Categories that are whole numbers, such as skin types, may be sent as such.
            integers = [int(word) for word in words if isinstance(word, str) and word.isdecimal()]
            about["enum"] = [*words, *integers, None]
        properties[field.name] = about
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"Metadata of {name}",
        "description": "Metadata of a patient. No field is required; null means the same as leaving the field out.",
        "type": "object",
        "properties": properties,
        "additionalProperties": False,
    }


def check_target(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise RunError(f"{out} is a file; name a folder for the bundle with --out")
    if out.is_dir() and any(out.iterdir()) and not hub.is_bundle(out):
        raise RunError(f"{out} isn't empty and isn't a bundle; name another folder with --out")


def _cases(
    run: Run,
    root: Path | None,
    cache: Path | None,
    image: ImageSection | None,
    metadata: MetadataEncoder,
    int8: bool | None,
) -> tuple[Cases, Cases | None, str]:
    """Return cases of validation (synthetic ones, if there are no data) and of training, and what the former are."""
    try:
        opened = open_run(run, root, cache=cache, device=torch.device("cpu"))
    except (DataError, RunError) as error:
        # A wrong folder that was named explicitly is a mistake.
        if root is not None:
            raise
        warn(
            f"the run's data aren't available ({error}). Parity is checked on synthetic images instead, and int8 is "
            "neither calibrated nor measured"
        )
        return synthetic_cases(SYNTHETIC, image, metadata), None, "on synthetic cases, without the run's images"
    size = opened.recipe.image.size
    validation = real_cases(opened.image_examples("val"), size, VALIDATION)
    training = None if image is None or int8 is False else real_cases(opened.image_examples("train"), size, TRAINING)
    return validation, training, f"on cases of {'the run' if run.members else 'validation'}"


def _write_float32(
    folder: Path, model: ExportedModel, trained: Network, cases: Cases, checked_on: str
) -> dict[str, Any]:
    """Write the ONNX file and torch's program, compare both with the trained network, and describe the former."""
    onnx_file, program_file = folder / "model.onnx", folder / "model.pt2"
    note("tracing the network and writing it as ONNX; half a minute, of large encoders some minutes")
    program = trace(model)
    write_onnx(program, model, onnx_file, {"dualrefnet": dualrefnet.__version__, "notice": NOTICE})
    write_program(program, program_file)
    tokens = not model.method.needs_image
    parity = check_parity(trained, OnnxNetwork(onnx_file), cases, tokens)
    of_program = check_parity(trained, ProgramNetwork(program_file, model.inputs), cases.part(0, BATCH), tokens)
    for name, found in (("ONNX", parity), ("torch.export", of_program)):
        if not found["max_probability_difference"] <= LIMIT:
            raise RunError(
                f"the {name} file doesn't predict as the trained model does: a probability differs by "
                f"{found['max_probability_difference']:.2g}, and {LIMIT:g} is the limit. Nothing was written. Please "
                "report this, with the recipe and the versions of `dualrefnet doctor`"
            )
    note(f"parity with torch: probabilities differ by {parity['max_probability_difference']:.1e} at most, {checked_on}")
    return {
        **_file(onnx_file),
        "parity": {**parity, "limit": LIMIT, "checked_on": checked_on},
        "inputs": [model.describe(name) for name in model.inputs],
        "outputs": [model.describe(name) for name in model.outputs],
    }


def _write_int8(folder: Path, run: Run, validation: Cases, training: Cases) -> dict[str, Any]:
    float32, file = folder / "model.onnx", folder / "model.int8.onnx"
    quantise(float32, file, training)
    score = run.out_of_scope if run.out_of_scope_file.is_file() else None
    classes = tuple(run.model["classes"])
    # Which says how much int8 changes, not how good the model is.
    images = "images that all members but one were trained on" if run.members else "validation images"
    networks = OnnxNetwork(float32), OnnxNetwork(file)
    measured, verdict, recommended = measure_int8(*networks, validation, classes, score, images)
    (note if recommended else warn)(f"int8: {verdict}")
    return {**_file(file), "setting": SETTING, "calibrated_on": len(training), "measured": measured, "verdict": verdict}


def _file(file: Path) -> dict[str, Any]:
    return {"file": file.name, "sha256": sha256_of_file(file), "bytes": file.stat().st_size}
