"""Tuning: a search by Optuna among the values that a recipe names under `tune`.

A trial trains the recipe with some of them on every fold; its score is the mean balanced accuracy on validation.
Nothing is ever predicted for a test split. A tuning folder holds `recipe.yaml`, `study.db` (Optuna's storage, which
this process alone opens: trainings in others leave run folders), `trials.csv`, `best.yaml`, `logs` and `runs`.
"""

from __future__ import annotations

import json
import typing
import warnings
from collections import deque
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from dualrefnet.data.loader import fill_recipe_store, read_dataset
from dualrefnet.display.format import PrintedTable, text_rows
from dualrefnet.errors import DependencyError, RecipeError, RunError, install_hint
from dualrefnet.files import locked, make_folder, write_csv, write_yaml
from dualrefnet.models.registry import METHODS
from dualrefnet.progress import note, progress_bar, warn
from dualrefnet.recipe import CROSS_FITTED, Recipe, TuneRange, differences, load_recipe
from dualrefnet.run import Run
from dualrefnet.training.loop import selection_value
from dualrefnet.training.preflight import check_recipe
from dualrefnet.training.workers import Job, available_cores, work

# What can't be tuned: trials would be measured on other images, or not differ.
FIXED = ("name", "description", "seed", "data", "evaluation", "tune")


def require_optuna() -> Any:
    """Return the module `optuna`, quiet."""
    try:
        import optuna
    except ImportError:
        raise DependencyError(
            f"tuning needs Optuna, which comes with the extra `tune`: {install_hint('tune')}"
        ) from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def tune_recipe(
    recipe: Recipe,
    out: Path,
    trials: int,
    folds: int | None = None,
    jobs: int = 1,
    ray_address: str | None = None,
    cache: Path | None = None,
) -> pd.DataFrame:
    """Search until the folder holds so many trials; write `trials.csv` and `best.yaml`, and return the former.

    `folds` a trial: None: all of `data.folds`; 1: the recipe's own split. Running it again goes on.
    """
    optuna = require_optuna()
    kinds = {key: _kind(recipe, key, wanted) for key, wanted in recipe.tune.items()}
    if not kinds:
        raise RecipeError(
            "the recipe names nothing to tune: add `tune:` with keys and ranges, such as "
            "`training.learning_rate: {low: 1e-4, high: 3e-3, log: true}`"
        )
    folds = _count_folds(recipe, folds)
    check_recipe(recipe)
    if out.is_file():
        raise RunError(f"{out} is a file; name a folder for the tuning with --out")
    out = out.absolute()
    with locked(make_folder(out) / ".lock", f"{out} is in use by another `dualrefnet tune`; wait until it ends"):
        _open_folder(out, recipe)
        study = _open_study(optuna, out, recipe, folds)
        if METHODS[recipe.model.method].reads_image or recipe.data.rows == "with_image":
            fill_recipe_store(recipe, read_dataset(recipe), cache)
        _Search(optuna, study, recipe, kinds, out, folds, jobs, cache).run(trials, ray_address)
        return _write_results(study, recipe, out, folds)


class _Search:
    """Asks the study for trials, trains them fold by fold, and tells it what came out."""

    def __init__(
        self,
        optuna: Any,
        study: Any,
        recipe: Recipe,
        kinds: dict[str, str],
        out: Path,
        folds: int,
        jobs: int,
        cache: Path | None,
    ) -> None:
        self.optuna, self.study, self.recipe, self.kinds = optuna, study, recipe, kinds
        self.out, self.folds, self.jobs, self.cache = out, folds, jobs, cache and cache.absolute()
        self.threads = max(1, available_cores() // jobs)
        self.queue: deque[Job] = deque()
        self.active: dict[str, Any] = {}

    def run(self, trials: int, ray_address: str | None) -> None:
        state = self.optuna.trial.TrialState
        # What a killed call has begun comes first.
        begun = [trial._trial_id for trial in self.study.get_trials(states=(state.RUNNING,))]
        if ray_address is not None:
            self.threads = 1
        with progress_bar("trials") as show:

            def fill() -> None:
                """Have as many trials under way as may be trained at a time."""
                while len(self.active) < self.jobs and (begun or len(self.study.trials) < trials):
                    self._advance(self.optuna.trial.Trial(self.study, begun.pop(0)) if begun else self._ask())
                done = self.study.get_trials(deepcopy=False, states=(state.COMPLETE, state.PRUNED, state.FAIL))
                show(len(done), max(trials, len(self.study.trials)))

            fill()
            with closing(work(self.queue, self.jobs, ray_address)) as events:
                for event in events:
                    if not event.ended:
                        continue
                    trial = self.active.pop(event.run)
                    if event.failure is not None:
                        self._fail(trial, event.failure.error)
                    else:
                        scores = [*trial.user_attrs.get("scores", []), self._score(event.run)]
                        trial.set_user_attr("scores", scores)
                        self._advance(trial)
                    _write_results(self.study, self.recipe, self.out, self.folds)
                    fill()

    def _ask(self) -> Any:
        # Seeded by trial, so that a search that was interrupted goes on as if it hadn't been.
        seed = (self.recipe.seed + len(self.study.trials)) % 2**32
        self.study.sampler = self.optuna.samplers.TPESampler(seed=seed, constant_liar=self.jobs > 1)
        return self.study.ask()

    def _advance(self, trial: Any) -> None:
        """Report what a trial has scored so far; end it, or queue its next fold."""
        scores = trial.user_attrs.get("scores", [])
        state = self.optuna.trial.TrialState
        if scores:
            with warnings.catch_warnings():
                # A killed call may have reported it already.
                warnings.simplefilter("ignore")
                trial.report(float(np.mean(scores)), len(scores) - 1)
        if len(scores) == self.folds:
            self.study.tell(trial, float(np.mean(scores)))
            note(f"trial {trial.number}: {np.mean(scores):.3f}, best so far {self.study.best_value:.3f}")
            return
        if scores and trial.should_prune():
            self.study.tell(trial, state=state.PRUNED)
            note(f"trial {trial.number}: {np.mean(scores):.3f} after {len(scores)} folds, pruned")
            return
        try:
            values = {key: _suggest(trial, key, kind, self.recipe.tune[key]) for key, kind in self.kinds.items()}
            recipe = self._fold(load_recipe(self.recipe, {**values, "tune": {}}), len(scores))
        except RecipeError as error:
            # Values that are legal alone may contradict each other.
            self._fail(trial, str(error))
            return
        run = f"trial{trial.number}-fold{len(scores)}"
        self.active[run] = trial
        folder = self.out / "runs" / run
        self.queue.append(Job(run, recipe, folder, self.out, self.cache, self.threads, tested=False))

    def _fold(self, recipe: Recipe, fold: int) -> Recipe:
        if self.folds == 1:
            return recipe
        return load_recipe(recipe, {"data.protocol": "grouped-cv", "data.fold": fold})

    def _fail(self, trial: Any, reason: str) -> None:
        trial.set_user_attr("error", reason)
        self.study.tell(trial, state=self.optuna.trial.TrialState.FAIL)
        warn(f"trial {trial.number} failed: {reason}")

    def _score(self, name: str) -> float:
        """Return the balanced accuracy on validation of the epoch that a run has kept, whose parameters go."""
        run = Run(self.out / "runs" / name)
        selection = self.recipe.training.selection
        rows: list[Any] = run.history.to_dict("records")
        for file in (run.weights_file, run.checkpoint_file):
            file.unlink(missing_ok=True)
        return float(max(rows, key=lambda row: selection_value(row, selection))["val_balanced_accuracy"])


def _kind(recipe: Recipe, key: str, wanted: TuneRange) -> str:
    """Return `int`, `float` or `values`; RecipeError: the key can't be tuned, or not so."""
    section, _, name = key.partition(".")
    if section in FIXED:
        raise RecipeError(f"tune: {key} can't be tuned: trials would be measured on other images, or not differ")
    for value in wanted.values or (wanted.low, wanted.high):
        try:
            load_recipe(recipe, {key: value if wanted.values or value != int(value) else int(value)})
        except RecipeError as error:
            raise RecipeError(f"tune: {key}={value}: {error}") from None
    if wanted.values:
        return "values"
    fields: Any = Recipe.model_fields[section].annotation
    annotation = fields.model_fields[name].annotation
    kinds = {annotation, *typing.get_args(annotation)}
    if float in kinds:
        return "float"
    if int not in kinds or wanted.low != int(wanted.low or 0) or wanted.high != int(wanted.high or 0):
        raise RecipeError(f"tune: {key} takes no numbers between low and high; list its `values`")
    return "int"


def _suggest(trial: Any, key: str, kind: str, wanted: TuneRange) -> Any:
    if kind == "int":
        return trial.suggest_int(key, int(wanted.low or 0), int(wanted.high or 0), log=wanted.log)
    if kind == "float":
        return trial.suggest_float(key, wanted.low, wanted.high, log=wanted.log)
    # Optuna keeps plain values; a list is one as JSON.
    texts = [json.dumps(value) for value in wanted.values]
    return json.loads(trial.suggest_categorical(key, texts))


def printed_trials(table: pd.DataFrame, at_most: int = 10) -> PrintedTable:
    shown = table.drop(columns="mean").head(at_most)
    rows = [
        tuple(f"{value:.3g}" if isinstance(value, float) else str(value) for value in row)
        for row in shown.itertuples(index=False, name=None)
    ]
    note = "The score is the mean balanced accuracy on validation; it is too good for the best of many."
    return PrintedTable("Trials", tuple(map(str, shown.columns)), text_rows(rows), (note,))


def _count_folds(recipe: Recipe, folds: int | None) -> int:
    data = recipe.data
    if data.protocol == "paper":
        raise RecipeError(
            "the paper's split leaks, and tuning on it chooses what remembers best: data.protocol=grouped"
        )
    if data.protocol == CROSS_FITTED:
        raise RecipeError("tune with data.protocol=grouped, and cross-fit best.yaml: `dualrefnet train ... --folds 5`")
    if data.protocol not in ("grouped", "grouped-cv"):
        if folds != 1:
            raise RecipeError(f"the split of data.protocol {data.protocol} is one: tune with --folds 1")
        return 1
    if folds is not None and not 1 <= folds <= data.folds:
        raise RecipeError(f"--folds {folds}: data.folds is {data.folds}, and each is the validation split once")
    return folds or data.folds


def _open_folder(out: Path, recipe: Recipe) -> None:
    file = out / "recipe.yaml"
    if file.is_file() and (out / "study.db").is_file():
        changed = differences(load_recipe(file), recipe)
        if changed:
            raise RunError(
                f"{out} was begun with another recipe or ranges ({'; '.join(changed[:3])}); name another folder with "
                "--out"
            )
        return
    others = [child.name for child in out.iterdir() if not child.name.startswith(".") and child != file]
    if others:
        raise RunError(f"{out} isn't empty and isn't a tuning folder; name another one with --out")
    write_yaml(file, recipe.model_dump(mode="json"))


def _open_study(optuna: Any, out: Path, recipe: Recipe, folds: int) -> Any:
    import sqlalchemy

    url = sqlalchemy.URL.create("sqlite", database=str(out / "study.db")).render_as_string()
    try:
        study = optuna.create_study(
            storage=url,
            study_name=recipe.name,
            direction="maximize",
            pruner=optuna.pruners.MedianPruner(),
            load_if_exists=True,
        )
        begun = study.user_attrs.get("folds", folds)
        study.set_user_attr("folds", folds)
    except sqlalchemy.exc.SQLAlchemyError as error:
        raise RunError(
            f"{out / 'study.db'} can't be used ({str(error).splitlines()[0]}): name another --out"
        ) from error
    if begun != folds:
        study.set_user_attr("folds", begun)
        raise RunError(f"{out} was begun with {begun} folds, not {folds}; name another folder with --out")
    return study


def _write_results(study: Any, recipe: Recipe, out: Path, folds: int) -> pd.DataFrame:
    """Write all trials, the best first, and the recipe of the best; return the former."""
    rows = []
    for trial in study.get_trials(deepcopy=False):
        scores = trial.user_attrs.get("scores", [])
        row = {"trial": trial.number, "state": trial.state.name.lower()}
        row |= {"score": trial.value, "folds": len(scores), "mean": float(np.mean(scores)) if scores else None}
        rows.append(row | trial.params | {"error": trial.user_attrs.get("error", "")})
    table = pd.DataFrame(rows).sort_values(["score", "trial"], ascending=[False, True], na_position="last")
    write_csv(out / "trials.csv", table)
    complete = [trial for trial in study.get_trials(deepcopy=False) if trial.state.name == "COMPLETE"]
    if complete:
        best = study.best_trial
        listed = {key for key, wanted in recipe.tune.items() if wanted.values}
        values = {key: json.loads(value) if key in listed else value for key, value in best.params.items()}
        said = f"tuned: trial {best.number} of {len(rows)}, balanced accuracy on validation {best.value:.3f}"
        said += f", mean of {folds} folds" if folds > 1 else ""
        tuned = load_recipe(recipe, {**values, "tune": {}, "name": f"{recipe.name[:190]}-tuned"})
        values = tuned.model_dump(mode="json", exclude_unset=True, exclude={"tune"})
        write_yaml(out / "best.yaml", values | {"description": f"{recipe.description}; {said}".removeprefix("; ")})
    return table
