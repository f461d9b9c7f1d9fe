"""One run from its recipe: prepare, split, encode, build, train, evaluate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

import dualrefnet
from dualrefnet.data.metadata import MetadataEncoder
from dualrefnet.data.pipeline import fill_recipe_store, make_examples, read_dataset, side_rows, split_rows
from dualrefnet.data.schema import DatasetSchema
from dualrefnet.evaluation.evaluate import evaluate_run
from dualrefnet.files import write_json
from dualrefnet.models.registry import WITHOUT_IMAGE, Architecture, check_method, new_model
from dualrefnet.progress import remark
from dualrefnet.recipe import Recipe
from dualrefnet.run import Run, fingerprint, save_fingerprint, start_run, write_split
from dualrefnet.training.loop import Trainer

MODEL_FORMAT = 1


def train_recipe(recipe: Recipe, out: Path, resume: bool = False, cache: Path | None = None, workers: int | None = None) -> Run:
    """Train and evaluate a recipe.

    Args:
        recipe: a checked recipe.
        out: the run folder.
        resume: go on with an unfinished run in `out`; a finished one is returned as it is.
        cache: where image stores lie; None: the user's cache folder.
        workers: threads that prepare images; None: one a core.

    Returns:
        The finished run.

    Raises:
        DualRefNetError: with what to do about it; see the subclasses.
    """
    check_method(recipe.model.method)
    state = PartialState(cpu=recipe.training.device == "cpu")
    # Several processes: the first one prepares files, the others wait and then find them.
    with state.main_process_first():
        run = start_run(out, recipe, resume or not state.is_main_process)
        if run.finished and resume:
            remark(f"{out} is finished already")
            return run
        dataset = read_dataset(recipe)
        store = None
        if recipe.model.method not in WITHOUT_IMAGE or recipe.data.rows == "with_image":
            store = fill_recipe_store(recipe, dataset, cache, workers)
        split = split_rows(recipe, dataset, store)
        write_split(run, split)
    if recipe.model.method in WITHOUT_IMAGE:
        # The rows are those of the image methods, so that the numbers can be compared; the pixels aren't read.
        store = None
    encoder = MetadataEncoder.fit(side_rows(dataset, split, "train"), dataset.schema, recipe.metadata, recipe.seed)
    train = make_examples(dataset, split, "train", encoder, store)
    val = make_examples(dataset, split, "val", encoder, store)
    torch.manual_seed(recipe.seed)
    model, architecture, source = new_model(recipe, encoder.width, len(dataset.schema.classes))
    if state.is_main_process:
        write_json(run.path / "model.json", model_description(recipe, architecture, encoder, dataset.schema, source))
        parameters = sum(parameter.numel() for parameter in model.parameters())
        remark(f"{recipe.model.method}: {parameters / 1e6:.2f} M parameters; encoder starts from: {source['description']}")
        remark(f"{len(train)} training and {len(val)} validation images; metadata {recipe.metadata.tier}, {encoder.width} columns")
    counts = torch.bincount(torch.tensor(train.labels), minlength=len(dataset.schema.classes))
    trainer = Trainer(model, recipe, run, counts, (tuple(source["mean"]), tuple(source["std"])))
    if state.is_main_process:
        save_fingerprint(run, fingerprint(recipe, dataset, split, source, trainer.precision, state.num_processes))
    trainer.fit(train, val)
    if state.is_main_process:
        evaluate_run(run, dataset=dataset, cache=cache, device=trainer.device)
        run.checkpoint_file.unlink(missing_ok=True)
    state.wait_for_everyone()
    return run


def model_description(
    recipe: Recipe, architecture: Architecture, encoder: MetadataEncoder, schema: DatasetSchema, source: dict[str, Any]
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
            "drawn": schema.drawn,
            "protocol": recipe.data.protocol,
        },
        "preprocessing": {"image": recipe.image.model_dump(mode="json"), "mean": list(source["mean"]), "std": list(source["std"])},
        "metadata": encoder.to_json(),
        "weights": source,
    }
