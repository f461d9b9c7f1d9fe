"""One run from its recipe: prepare, split, encode, build, train, evaluate."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

import dualrefnet
from dualrefnet.analysis.evaluate import evaluate_run
from dualrefnet.data.loader import fill_recipe_store, make_examples, read_dataset, recipe_split, split_rows
from dualrefnet.data.metadata import MetadataEncoder
from dualrefnet.data.schema import DatasetSchema
from dualrefnet.errors import RunError
from dualrefnet.files import sha256_of_file, write_json
from dualrefnet.models.base import Architecture
from dualrefnet.models.encoders import resolve_weights
from dualrefnet.models.inference import fill_features
from dualrefnet.models.registry import METHODS, check_method, new_model
from dualrefnet.models.superresolution import fill_targets
from dualrefnet.progress import note, warn
from dualrefnet.recipe import Recipe
from dualrefnet.run import Run, fingerprint, refuse_taken, run_lock, start_run, write_split
from dualrefnet.training.cost import prediction_cost
from dualrefnet.training.loop import Trainer

MODEL_FORMAT = 2
# In errors of torch: its allocators, oneDNN, C++.
OUT_OF_MEMORY = ("can't allocate memory", "out of memory", "could not create a primitive", "bad_alloc")


@contextmanager
def enough_memory() -> Iterator[None]:
    """Say in one line that a limit of the machine ended the training, and what to set."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, MemoryError) or any(words in str(error) for words in OUT_OF_MEMORY):
            raise RunError(
                "there isn't enough memory: lower training.batch_size, evaluation.batch_size or image.size, or raise "
                "the limit of this process; then go on with --resume"
            ) from error
        if "can't start new thread" in str(error):
            raise RunError("no more threads may be started: lower --workers and OMP_NUM_THREADS") from error
        raise


@enough_memory()
def train_recipe(
    recipe: Recipe,
    out: Path,
    resume: bool = False,
    cache: Path | None = None,
    workers: int | None = None,
    *,
    overwrite: bool = False,
) -> Run:
    """Train and evaluate a checked recipe into the folder `out`; return the finished run.

    `resume` goes on with an unfinished run in `out`, and returns a finished one as it is; `overwrite` replaces either.
    `cache` is the folder of the image stores (None: the user's cache folder); `workers` threads prepare images (None:
    one a core).
    """
    check_method(recipe)
    try:
        state = PartialState(cpu=recipe.training.device == "cpu")
    except (ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        fix = "start several processes with `accelerate launch`, or unset LOCAL_RANK"
        raise RunError(f"the processes of this training don't find each other ({reason}); {fix}") from None
    if state.is_main_process:
        refuse_taken(out, resume, overwrite)
    if not (resume and Run(out).finished):
        _check_machine(recipe, state)
    with run_lock(out) if state.is_main_process else nullcontext():
        return _train(recipe, out, resume, cache, workers, state, overwrite)


def _check_machine(recipe: Recipe, state: PartialState) -> None:
    """Refuse a device or weights that aren't here, before a folder is made and an image is read."""
    device = recipe.training.device
    if device not in ("auto", "cpu", state.device.type):
        raise RunError(
            f"training.device is {device}, and this machine offers {state.device.type}; use training.device=auto"
        )
    if METHODS[recipe.model.method].reads_image:
        with state.main_process_first():
            for backbone in dict.fromkeys(recipe.model.backbones):
                resolve_weights(backbone, recipe.model.weights)


def _train(
    recipe: Recipe,
    out: Path,
    resume: bool,
    cache: Path | None,
    workers: int | None,
    state: PartialState,
    overwrite: bool,
) -> Run:
    method = METHODS[recipe.model.method]
    # Several processes: the first one prepares files, the others wait and then find them.
    with state.main_process_first():
        run = start_run(out, recipe, resume, overwrite) if state.is_main_process else Run(out)
        if run.finished and resume:
            damage = run.damage()
            if not damage:
                note(f"{out} is finished already")
            elif run.weights_file.is_file():
                warn(f"{damage}; the run is measured again")
                evaluate_run(run, cache=cache, device=state.device)
            if not damage or run.weights_file.is_file():
                run.checkpoint_file.unlink(missing_ok=True)
                return run
            warn(f"{damage}; the run is trained again")
            run.metrics_file.unlink()
        dataset = read_dataset(recipe)
        store = None
        if method.reads_image or recipe.data.rows == "with_image":
            store = fill_recipe_store(recipe, dataset, cache, workers)
        split = recipe_split(recipe, dataset, store)
        write_split(run, split)
    if not method.reads_image:
        # The rows are those of the image methods, so that the numbers can be compared; the pixels aren't read.
        store = None
    encoder = MetadataEncoder.fit(split_rows(dataset, split, "train"), dataset.schema, recipe.metadata, recipe.seed)
    if (
        recipe.modality_dropout.enabled
        and state.is_main_process
        and not (method.reads_image and method.reads_metadata and encoder.width)
    ):
        note(f"{recipe.model.method} reads one modality: the shares of modality_dropout have no part in its training")
    torch.manual_seed(recipe.seed)
    model, architecture, sources = new_model(recipe, encoder.width, len(dataset.schema.classes))
    # Before any part of it is moved to a GPU.
    cost = prediction_cost(model, architecture)
    frozen = recipe.training.encoder == "frozen" and method.reads_image
    with state.main_process_first():
        features = fill_features(recipe, model, store, state.device) if frozen and store is not None else ()
        targets, target_source = fill_targets(recipe, store, state.device) if store is not None else (None, None)
    train = make_examples(dataset, split, "train", encoder, store, features, targets)
    val = make_examples(dataset, split, "val", encoder, store, features)
    if state.is_main_process:
        description = model_description(recipe, architecture, encoder, dataset.schema, sources)
        write_json(run.path / "model.json", {**description, "cost": cost})
        start = "; ".join(dict.fromkeys(str(source["description"]) for source in sources))
        parameters = sum(parameter.numel() for parameter in model.parameters())
        note(f"{recipe.model.method}: {parameters / 1e6:.2f} M parameters; encoder starts from: {start}")
        if frozen:
            note(
                "the encoder is frozen: the rest is trained on its features, without augmentation and without "
                "the auxiliary task"
            )
        note(
            f"{len(train)} training and {len(val)} validation images; metadata {recipe.metadata.tier}, "
            f"{encoder.width} columns"
        )
    counts = torch.bincount(torch.tensor(train.labels), minlength=len(dataset.schema.classes))
    trainer = Trainer(model, recipe, run, counts, (tuple(sources[0]["mean"]), tuple(sources[0]["std"])), encoder.spans)
    if state.is_main_process:
        write_json(
            run.path / "fingerprint.json",
            fingerprint(recipe, dataset, split, sources, target_source, trainer.precision, state.num_processes),
        )
    trainer.fit(train, val)
    if state.is_main_process:
        write_json(run.path / "fingerprint.json", {**run.fingerprint, "model_sha256": sha256_of_file(run.weights_file)})
        evaluate_run(run, dataset=dataset, cache=cache, device=trainer.device)
        # Only an unfinished run needs it.
        run.checkpoint_file.unlink(missing_ok=True)
    state.wait_for_everyone()
    return run


def model_description(
    recipe: Recipe,
    architecture: Architecture,
    encoder: MetadataEncoder,
    schema: DatasetSchema,
    sources: list[dict[str, Any]],
) -> dict[str, Any]:
    """Return `model.json`: everything besides the weights that prediction needs, as plain JSON."""
    return {
        "format": MODEL_FORMAT,
        "dualrefnet": dualrefnet.__version__,
        "architecture": architecture.model_dump(mode="json"),
        "classes": list(schema.classes),
        "malignant": list(schema.malignant),
        "dataset": {
            "name": schema.name,
            "title": schema.title,
            "licence": schema.licence,
            "citation": schema.citation,
            "drawn": schema.synthetic,
            "class_names": schema.class_names,
            "protocol": recipe.data.protocol,
        },
        "preprocessing": {
            "image": recipe.image.model_dump(mode="json"),
            "mean": list(sources[0]["mean"]),
            "std": list(sources[0]["std"]),
        },
        "metadata": encoder.to_json(),
        "weights": sources,
    }
