"""The whole paper: its suites in order, what they cost, and whether its numbers and claims hold here."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd

from dualrefnet.display.format import Cell, PrintedTable
from dualrefnet.errors import DataError, RecipeError
from dualrefnet.evaluation.bootstrap import NAN, Difference, Estimate
from dualrefnet.progress import note, warn
from dualrefnet.recipe import Recipe, load_recipe, suggestion
from dualrefnet.run import Run
from dualrefnet.suite.grid import Key, Suite, expand, load_suite, prepare, same_training
from dualrefnet.suite.results import SuiteResults, System, paper, printed_value, reported_splits
from dualrefnet.suite.runner import SMOKE_IMAGES, Outcome, run_suite
from dualrefnet.training.workers import Failure

PARTS = ("table1", "table2", "table3a", "table3b", "table4", "figure1e", "figure7", "ablations")
MEASURE = "balanced_accuracy"
# The encoder with which the paper's DualRefNet is best.
BEST = {"pad_ufes_20": "vgg13", "isic_2019": "densenet121"}

Verdict = Literal["reproduced", "within the interval", "contradicted", "can't be measured here"]
UNMEASURED: Verdict = "can't be measured here"


def paper_suites(
    only: Collection[str], overrides: Mapping[str, Any], smoke: bool, out: Path
) -> tuple[dict[str, Suite], list[str]]:
    """Return the suites by their part's name, all of them or `only` some, and remarks on what a smoke test replaces."""
    for name in only:
        if name not in PARTS:
            raise RecipeError(
                f"--only: no part is called {name!r}{suggestion(name, PARTS)} (there are: {', '.join(PARTS)})"
            )
    suites, remarks = {}, []
    for name in PARTS:
        if not only or name in only:
            suites[name], more = prepare(load_suite(name), overrides, out.absolute() / "data" if smoke else None)
            remarks += more
    return suites, list(dict.fromkeys(remarks))


def run_paper(
    suites: Mapping[str, Suite], out: Path, workers: int = 1, cache: Path | None = None
) -> dict[str, Outcome]:
    """Train what the folders of the suites in `out` lack; a part that can't begin is recorded as failed."""
    outcomes: dict[str, Outcome] = {}
    elsewhere: dict[str, Path] = {}
    for place, (name, suite) in enumerate(suites.items(), 1):
        note(f"part {place} of {len(suites)}: {suite.title}")
        try:
            outcomes[name] = run_suite(suite, out / name, workers, cache, elsewhere=elsewhere)
        except DataError as error:
            outcomes[name] = Outcome(0, 0, failed={name: Failure(" ".join(str(error).split()), "DataError")})
            warn(f"{name}: {error}")
        for cell in expand(suite):
            run = Run(out / name / "runs" / cell.run)
            if run.finished:
                elsewhere.setdefault(same_training(cell.recipe), run.path)
    return outcomes


def verdict_on_number(printed: float, ours: Estimate, digits: int) -> Verdict:
    """Judge a printed number: the same when ours is rounded, in our 95% interval, or neither."""
    if np.isnan(ours.value) or np.isnan(printed):
        return UNMEASURED
    if abs(ours.value - printed) <= 0.5 * 10**-digits + 1e-9:
        return "reproduced"
    return "within the interval" if ours.low <= printed <= ours.high else "contradicted"


def verdict_on_claim(claimed: float, ours: Difference) -> Verdict:
    """Judge a difference that the paper has above zero, by `claimed` if that is known (else NaN).

    Reproduced: our whole interval is above zero. Contradicted: it is below, or doesn't reach what is claimed. Else the
    interval holds zero and the claim alike.
    """
    if np.isnan(ours.value) or np.isnan(ours.low):
        return UNMEASURED
    if ours.low > 0:
        return "reproduced"
    if ours.high < 0 or ours.high < claimed:
        return "contradicted"
    return "within the interval"


def summarise(verdicts: Collection[Verdict]) -> str:
    """Return how often each verdict was given, the worst one first."""
    counts = {
        verdict: list(verdicts).count(verdict) for verdict in ("contradicted", "within the interval", "reproduced")
    }
    found = ", ".join(f"{verdict}: {count}" for verdict, count in counts.items() if count)
    return f"{found} of {len(verdicts)}" if found else UNMEASURED


@dataclass(frozen=True)
class Claim:
    """Something that the paper says of two systems, in favour of which a difference is above zero: the paper's (NaN if
    it prints none) and ours; `p` is corrected as in the suite's tables. `limits`: why it isn't the paper's experiment.
    """

    part: str
    dataset: str
    text: str
    printed: float
    ours: Difference
    verdict: Verdict
    limits: tuple[str, ...]


def claims(results: Mapping[str, SuiteResults]) -> list[Claim]:
    found = []
    for claim in paper()["claims"]:
        for dataset in claim["datasets"]:
            suite = results.get(claim["part"])
            if suite is not None:
                found.append(_judge(claim, dataset, suite))
    return found


def _judge(claim: Mapping[str, Any], dataset: str, found: SuiteResults) -> Claim:
    sign, of = claim["sign"], claim["of"]
    by_class = "class" in claim or "others" in claim
    rows = _of(found.class_comparisons if by_class else found.comparisons, found, dataset, of)
    if len(rows):
        rows = rows[rows["measure"] == ("sensitivity" if by_class else MEASURE)]
    if by_class and len(rows):
        rows = rows[rows["class"] == claim["class"]] if "class" in claim else rows[rows["class"] != claim["others"]]
        # Of several classes the one that loses most.
        rows = rows.sort_values("difference").head(1)
    text = claim["text"]
    ours, printed = Difference(NAN), float(claim.get("size", NAN))
    limits: tuple[str, ...] = ("no run of both is finished",)
    if len(rows):
        row = rows.iloc[0]
        low, high = (row["low"], row["high"]) if sign > 0 else (-row["high"], -row["low"])
        # Adding zero makes 0 of -0.
        value, low, high = (float(np.round(number, 12)) + 0.0 for number in (sign * row["difference"], low, high))
        ours = Difference(value, low, high, row["p_holm"])
        pair = [system for system in (system_of(found, row), _reference_of(found, row)) if system is not None]
        limits = tuple(dict.fromkeys(text for system in pair for text in system.departures))
        values = [_printed(system, dataset, of, found.suite) for system in pair]
        if not by_class and len(values) == 2:
            printed = sign * (values[0] - values[1])
        if "others" in claim:
            text += f" (most for {row['class']})"
    verdict = UNMEASURED if limits else verdict_on_claim(printed, ours)
    if "others" in claim and not limits and not np.isnan(ours.low):
        verdict = "contradicted" if ours.high < 0 else "reproduced" if ours.low >= 0 else "within the interval"
    return Claim(claim["part"], dataset, text, printed, ours, verdict, limits)


def _printed(system: System, dataset: str, of: Mapping[str, str], suite: Suite) -> float:
    """Return the paper's number for a system; that of a smoke test stands for the system of the claim."""
    key = system.key
    if suite.smoke:
        key = key._replace(dataset=dataset, backbone=of.get("backbone", BEST[dataset]))
    found = printed_value(replace(system, key=key), MEASURE, suite)
    return found.value if found else NAN


def _of(rows: pd.DataFrame, found: SuiteResults, dataset: str, of: Mapping[str, str]) -> pd.DataFrame:
    """Return the rows of a system; a smoke test has one data set and one CNN in place of all."""
    if not len(rows):
        return rows
    chosen = rows if found.suite.smoke else rows[rows["dataset"] == dataset]
    for name, value in of.items():
        known = name != "backbone" or not found.suite.smoke or (chosen["backbone"] == value).any()
        chosen = chosen[chosen[name] == value] if known else chosen
    return chosen


def system_of(found: SuiteResults, row: pd.Series) -> System | None:
    key = Key(*(str(row[name]) for name in Key._fields))
    return next((system for system in found.members if system.key == key), None)


def _reference_of(found: SuiteResults, row: pd.Series) -> System | None:
    for system in found.members:
        same = system.key[:2] == (row["dataset"], row["protocol"])
        if same and " ".join(part for part in system.key[2:] if part) == row["reference"]:
            return system
    return None


# What the machine's speed is measured with.
RESNET = load_recipe(
    {"name": "cost"}, {"model.method": "no_metadata", "model.backbone": "resnet50", "model.weights": "none"}
)


def plan_table(suites: Mapping[str, Suite]) -> PrintedTable:
    """Return runs, hours of training on this machine and disk of every part; a run that an earlier part has is free."""
    rate = _multiply_adds_per_second()
    seen: set[str] = set()
    stores: set[tuple[object, ...]] = set()
    rows, totals = [], [0, 0, 0.0, 0.0]
    for name, suite in suites.items():
        recipes = {same_training(cell.recipe): cell.recipe for cell in expand(suite)}
        new = {key: recipe for key, recipe in recipes.items() if key not in seen}
        seen |= set(new)
        seconds = gigabytes = 0.0
        for recipe in new.values():
            cost = _network_cost(recipe)
            train, val, total = _images(recipe)
            # The backward pass costs about two forward passes.
            seconds += recipe.training.epochs * (3 * train + val) * cost["multiply_adds"] / rate
            gigabytes += 4 * cost["parameters"] / 1e9
            for store, bytes_each in _stores(recipe).items():
                if store not in stores:
                    stores.add(store)
                    gigabytes += total * bytes_each / 1e9
        found = [len(new), len(recipes) - len(new), seconds / 3600, gigabytes]
        rows.append([Cell(name), Cell(suite.title), *_plan_cells(found)])
        totals = [before + more for before, more in zip(totals, found, strict=True)]
    rows.append([Cell("all"), Cell(""), *_plan_cells(totals)])
    notes = (
        "Shared: trained for an earlier part. Hours: about, by the multiply-adds of each network and the time that "
        "ResNet-50 takes on this machine; networks differ by a factor of two or three. Disk: models and image stores.",
    )
    return PrintedTable(
        "The paper; nothing was trained", ("part", "", "runs", "shared", "hours", "GB"), rows, notes, left=2
    )


def _plan_cells(values: list[float]) -> list[Cell]:
    new, shared, hours, gigabytes = values
    return [Cell(f"{new:,}"), Cell(f"{shared:,}"), Cell(f"{hours:,.1f}"), Cell(f"{gigabytes:,.1f}")]


def _images(recipe: Recipe) -> tuple[int, int, int]:
    counts = {part: sum(classes.values()) for part, classes in reported_splits(recipe.data.dataset).items()}
    if not counts:
        return SMOKE_IMAGES * 3 // 5, SMOKE_IMAGES // 5, SMOKE_IMAGES
    return counts["train"], counts["val"], sum(counts.values())


def _stores(recipe: Recipe) -> dict[tuple[object, ...], int]:
    """Return the stores that a recipe fills, each with its bytes an image."""
    size, target = recipe.image.size, recipe.model.target
    image = (recipe.data.dataset, recipe.image.model_dump_json())
    found: dict[tuple[object, ...], int] = {image: 3 * size**2}
    if recipe.rebuilds_image and target not in ("bilinear", "bicubic"):
        found[(*image, target)] = 3 * (2 * size) ** 2
    return found


@cache
def _cost_of(text: str) -> dict[str, int]:
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    from dualrefnet.models.registry import new_model
    from dualrefnet.training.cost import CLASSES, COLUMNS, network_cost

    # Nothing is computed: first parameters without content, then tensors that only know their shape.
    with torch.device("meta"):
        model, architecture, _ = new_model(Recipe.model_validate_json(text), COLUMNS, CLASSES)
    with FakeTensorMode(allow_non_fake_inputs=True):
        return network_cost(model.to_empty(device="cpu"), architecture, training=True)


def _network_cost(recipe: Recipe) -> dict[str, int]:
    model = recipe.model.model_copy(update={"weights": "none", "target": "bicubic"})
    plain = Recipe(name="cost", model=model, image=recipe.image, metadata=recipe.metadata)
    return _cost_of(plain.model_dump_json())


def _multiply_adds_per_second() -> float:
    """Time a step of ResNet-50 on the device that trains."""
    import time

    import torch

    from dualrefnet.models.encoders import create_encoder
    from dualrefnet.models.inference import resolve_device

    device, batch = resolve_device(None), 4
    encoder = create_encoder("resnet50", "none", 224).to(device).train()
    images = torch.randn(batch, 3, 224, 224, device=device)
    seconds = []
    for _ in range(2):
        start = time.monotonic()
        float(encoder(images).vector.square().sum().backward() is None)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.monotonic() - start)
    return 3 * batch * _network_cost(RESNET)["multiply_adds"] / min(seconds)
