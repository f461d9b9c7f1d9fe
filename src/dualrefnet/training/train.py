"""One run from its recipe: prepare, split, encode, build, train, evaluate; or its members, one a fold."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from accelerate import PartialState
from numpy.typing import NDArray

import dualrefnet
from dualrefnet.analysis.evaluate import evaluate_run
from dualrefnet.data.loader import fill_recipe_store, make_examples, read_dataset, recipe_split, split_rows
from dualrefnet.data.metadata import MetadataEncoder
from dualrefnet.data.protocols import member_split
from dualrefnet.data.schema import Dataset, DatasetSchema
from dualrefnet.data.store import ImageStore
from dualrefnet.errors import RunError
from dualrefnet.files import make_folder, sha256_of_file, sha256_of_json, write_csv, write_json
from dualrefnet.models.base import Architecture, Method
from dualrefnet.models.encoders import resolve_weights
from dualrefnet.models.inference import fill_features
from dualrefnet.models.registry import METHODS, check_method, new_model
from dualrefnet.models.superresolution import fill_targets
from dualrefnet.models.transfer import SourceRun
from dualrefnet.progress import note, progress_bar, warn
from dualrefnet.recipe import CROSS_FITTED, Recipe, load_recipe
from dualrefnet.run import MEMBERS, Run, fingerprint, refuse_taken, run_lock, start_run, write_split
from dualrefnet.training.cost import network_cost
from dualrefnet.training.loop import Trainer
from dualrefnet.training.tracking import Tracker, require_tracker
from dualrefnet.training.workers import Job, available_cores, work

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


class Prepared(NamedTuple):
    """What a training reads."""

    dataset: Dataset
    store: ImageStore | None  # None for methods that read no image
    split: pd.DataFrame
    encoder: MetadataEncoder


@enough_memory()
def train_recipe(
    recipe: Recipe,
    out: Path,
    resume: bool = False,
    cache: Path | None = None,
    workers: int | None = None,
    jobs: int = 1,
    ray_address: str | None = None,
    *,
    overwrite: bool = False,
    tested: bool = True,
    dataset: Dataset | None = None,
) -> Run:
    """Train and evaluate a checked recipe into the folder `out`; return the finished run.

    Of a cross-fitted run `jobs` members are trained at the same time. Without `tested` nothing is predicted for the
    test split, and the run stays unfinished, with its checkpoint. `dataset`: what `check_start` has read.
    """
    check_method(recipe)
    require_tracker(recipe.training.tracker)
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
        # Several processes: the first one prepares files, the others wait and then find them.
        with state.main_process_first():
            run = start_run(out, recipe, resume, overwrite) if state.is_main_process else Run(out)
            if run.finished and resume and _mend(run, cache, state.device):
                return run
            prepared = _prepare(run, cache, workers, state.is_main_process, tested, dataset)
        if recipe.data.protocol == CROSS_FITTED:
            _train_members(run, prepared, cache, workers, jobs, ray_address)
        # The members of a cross-fitted run have trackers of their own.
        with Tracker(run) as tracker:
            if recipe.data.protocol != CROSS_FITTED:
                _train(run, prepared, state, tracker)
            if state.is_main_process and tested:
                evaluate_run(run, dataset=prepared.dataset, cache=cache, device=state.device)
                tracker.log_result()
                # Only an unfinished run needs it.
                run.checkpoint_file.unlink(missing_ok=True)
        state.wait_for_everyone()
        return run


def _check_machine(recipe: Recipe, state: PartialState) -> None:
    """Refuse a device or weights that aren't here, before a folder is made and an image is read."""
    device = recipe.training.device
    if device not in ("auto", "cpu", state.device.type):
        raise RunError(
            f"training.device is {device}, and this machine offers {state.device.type}; use training.device=auto"
        )
    if recipe.model.init_from is not None:
        SourceRun.open(recipe)
    elif METHODS[recipe.model.method].reads_image:
        with state.main_process_first():
            for backbone in dict.fromkeys(recipe.model.backbones):
                resolve_weights(backbone, recipe.model.weights)


def train_member(run: Run, fold: int, cache: Path | None = None, workers: int | None = None) -> None:
    """Train the member of a cross-fitted run that is tested on a fold; the run was begun by `train_recipe`."""
    recipe = run.recipe
    dataset = read_dataset(recipe)
    store = fill_recipe_store(recipe, dataset, cache, workers) if METHODS[recipe.model.method].reads_image else None
    encoder = MetadataEncoder.from_json(run.model["metadata"])
    _train_member(run, fold, Prepared(dataset, store, run.split, encoder))


def _mend(run: Run, cache: Path | None, device: torch.device) -> bool:
    """Return whether a finished run is whole, if need be measured again; else it must be trained again."""
    damage = run.damage()
    whole = all(one.weights_file.is_file() for one in run.members or [run])
    if not damage:
        note(f"{run.path} is finished already")
    elif whole:
        warn(f"{damage}; the run is measured again")
        evaluate_run(run, cache=cache, device=device)
    if not damage or whole:
        run.checkpoint_file.unlink(missing_ok=True)
        return True
    warn(f"{damage}; the run is trained again")
    run.metrics_file.unlink()
    return False


def _prepare(
    run: Run, cache: Path | None, workers: int | None, shown: bool, tested: bool, loaded: Dataset | None
) -> Prepared:
    """Read the data, divide them and fit the encoder of the metadata; warn, if `shown`, of what is odd about them."""
    recipe = run.recipe
    method = METHODS[recipe.model.method]
    dataset = read_dataset(recipe, loaded)
    store = None
    if method.reads_image or recipe.data.rows == "with_image":
        store = fill_recipe_store(recipe, dataset, cache, workers)
    split = recipe_split(recipe, dataset, store, tested)
    write_split(run, split)
    if not method.reads_image:
        # The rows are those of the image methods, so that the numbers can be compared; the pixels aren't read.
        store = None
    # The members of a cross-fitted run share one encoder of the metadata, which has seen all rows, but no label.
    encoder = MetadataEncoder.fit(split_rows(dataset, split, "train"), dataset.schema, recipe.metadata, recipe.seed)
    if (
        shown
        and recipe.modality_dropout.enabled
        and not (method.reads_image and method.reads_metadata and encoder.width)
    ):
        note(f"{recipe.model.method} reads one modality: the shares of modality_dropout have no part in its training")
    return Prepared(dataset, store, split, encoder)


def _train_members(
    run: Run, prepared: Prepared, cache: Path | None, workers: int | None, jobs: int, ray_address: str | None
) -> None:
    """Train the members that aren't yet, and describe the model that they are together."""
    state, recipe = PartialState(), run.recipe
    waiting = [fold for fold, member in enumerate(run.members) if not member.trained]
    done = len(run.members) - len(waiting)
    if state.is_main_process and done:
        note(f"{done} of {len(run.members)} members are trained already")
    if state.is_main_process:
        model, architecture, sources = _new_model(recipe, prepared)
        about = model_description(recipe, architecture, prepared.encoder, prepared.dataset.schema, sources)
        cost = {name: len(run.members) * value for name, value in network_cost(model, architecture).items()}
        write_json(run.path / "model.json", about | {"members": len(run.members), "cost": cost})
        del model
    if jobs == 1 and ray_address is None:
        for fold in waiting:
            if state.is_main_process:
                note(f"member {fold + 1} of {len(run.members)}")
            _train_member(run, fold, prepared)
    elif state.num_processes > 1:
        raise RunError("members are trained one after the other under `accelerate launch`: leave --jobs and --ray out")
    else:
        _train_elsewhere(run, waiting, cache, jobs, ray_address)
    if not state.is_main_process:
        return
    histories = [member.history for member in run.members]
    # Of members that stop early the mean is over those that go on.
    write_csv(run.path / "history.csv", pd.concat(histories).groupby("epoch", as_index=False).mean())
    made = run.members[0].fingerprint
    data = {**made["data"], "split_sha256": sha256_of_json(prepared.split.to_csv(index=False))}
    sums = [member.fingerprint["model_sha256"] for member in run.members]
    whole = {**made, "data": data | {"rows_used": len(prepared.split)}, "members_sha256": sums}
    write_json(run.path / "fingerprint.json", {name: value for name, value in whole.items() if name != "model_sha256"})


def _train_elsewhere(run: Run, folds: list[int], cache: Path | None, jobs: int, ray_address: str | None) -> None:
    """Train members in processes of this machine, or on a Ray cluster; their output is in `logs`."""
    home, threads = run.path.absolute(), max(1, available_cores() // jobs) if ray_address is None else 1
    every = {
        f"member {fold + 1}": Job(
            f"member {fold + 1}", run.recipe, home, home / MEMBERS, cache and cache.absolute(), threads, fold
        )
        for fold in folds
    }
    failed = []
    with progress_bar("members") as show, closing(work(list(every.values()), jobs, ray_address)) as events:
        done = 0
        for event in events:
            if not event.ended:
                note(f"started {event.run}; its output is in {every[event.run].log}")
                continue
            done += 1
            show(done, len(every))
            if event.failure is not None:
                failed.append(f"{event.run}: {event.failure.error}")
    if failed:
        raise RunError(f"{'; '.join(failed)}. The others are kept: the same command with --resume goes on")


def _train_member(run: Run, fold: int, prepared: Prepared) -> None:
    recipe = load_recipe(run.recipe, {"data.fold": fold})
    member = start_run(make_folder(run.members[fold].path), recipe, resume=True)
    split = member_split(prepared.split, fold, recipe.chooses_by_validation)
    if PartialState().is_main_process:
        write_split(member, split)
    with Tracker(member) as tracker:
        _train(member, prepared._replace(split=split), PartialState(), tracker)
    # Only an unfinished run needs it.
    member.checkpoint_file.unlink(missing_ok=True)


def _new_model(recipe: Recipe, prepared: Prepared) -> tuple[Method, Architecture, list[dict[str, Any]]]:
    torch.manual_seed(recipe.seed)
    return new_model(recipe, prepared.encoder.width, len(prepared.dataset.schema.classes))


def _train(run: Run, prepared: Prepared, state: PartialState, tracker: Tracker) -> None:
    """Train one model, of a run or of one of its members."""
    recipe, (dataset, store, split, encoder) = run.recipe, prepared
    model, architecture, sources = _new_model(recipe, prepared)
    # Before any part of it is moved to a GPU.
    cost = network_cost(model, architecture)
    frozen = recipe.training.encoder == "frozen" and METHODS[recipe.model.method].reads_image
    with state.main_process_first():
        features = fill_features(recipe, model, store, state.device) if frozen and store is not None else ()
        targets, target_source = fill_targets(recipe, store, state.device) if store is not None else (None, None)
    train = make_examples(dataset, split, "train", encoder, store, features, targets)
    if recipe.loss.teacher is not None:
        train = replace(train, soft_labels=taught(recipe.loss.teacher, train.image_ids, dataset.schema.classes))
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
    trainer.fit(train, val, tracker)
    if state.is_main_process:
        # A training with this sum is over.
        write_json(run.path / "fingerprint.json", {**run.fingerprint, "model_sha256": sha256_of_file(run.weights_file)})


def taught(teacher: str, image_ids: Sequence[str], classes: Sequence[str]) -> NDArray[np.float32]:
    """Return what a cross-fitted run says of images that its members haven't seen, (N, C)."""
    run = Run(Path(teacher))
    if not run.members:
        raise RunError(f"loss.teacher: {teacher} isn't a cross-fitted run (`dualrefnet train RECIPE --folds 5`)")
    if run.model["classes"] != list(classes):
        raise RunError(f"loss.teacher: {teacher} knows other classes: {', '.join(run.model['classes'])}")
    predictions = run.predictions.set_index("image_id")[[f"prob_{name}" for name in classes]]
    unknown = set(image_ids) - set(predictions.index)
    if unknown:
        raise RunError(f"loss.teacher: {teacher} has no prediction of {len(unknown)} of the training images")
    return predictions.loc[list(image_ids)].to_numpy(np.float32)


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
