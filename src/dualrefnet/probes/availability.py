"""What a trained run is worth when a part of the form, all of it, or the photograph isn't there.

Answers are removed from the lesion table's rows and then encoded by the run's own encoder, so that imputation and flags act as
they do in use. Which answers are removed depends on the data set and the seed alone, and those that a larger share keeps hold those
of a smaller one: two runs are asked the same questions, and can be compared in pairs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from dualrefnet.errors import DataError
from dualrefnet.evaluation.changed_inputs import Floats, Forms, ask_with_forms, ask_without_photograph, keep_answers
from dualrefnet.evaluation.comparison import PooledBootstrap, pooled_bootstrap
from dualrefnet.evaluation.intervals import percentile_interval
from dualrefnet.evaluation.missing_patterns import find_patterns
from dualrefnet.evaluation.opened_run import OpenedRun
from dualrefnet.progress import progress_bar

SHARES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
MEASURES = ("balanced_accuracy", "auc_macro_ovr")
WITH, WITHOUT = "with photograph", "without photograph"
LEVEL = 0.95


@dataclass(frozen=True)
class Availability:
    """How a run does with what is there.

    Attributes:
        name: of the run, for people.
        curve: one row a photograph (`with photograph`, `without photograph`), share and measure: photograph, share (of the recorded
            answers that were kept), answers_kept (on average), draws, measure, value (mean over draws), low, high; difference,
            difference_low, difference_high from the whole form with the same photograph.
        patterns: one row a photograph, pattern and measure: photograph, pattern (its name), removed (the fields, with `; ` between),
            training_share (of the training rows that show it; NaN if it wasn't looked for), answers_kept, measure, value and so on.
        chance: balanced accuracy of guessing.
        bootstrap: what the tables were made from: the value of every question in every resample.
        image_ids: (N,) of the test images.
        groups: (N,) their patients.
        fields: of the form, of which shares are kept, also those that the run doesn't read.
        unit: what was resampled, `patient` or `lesion`.
        draws: choices of answers of which the mean is taken.
        samples: of the bootstrap.
        seed: of choices and bootstrap.
    """

    name: str
    curve: pd.DataFrame
    patterns: pd.DataFrame
    chance: float
    bootstrap: PooledBootstrap
    image_ids: tuple[str, ...]
    groups: tuple[str, ...]
    fields: int
    unit: str
    draws: int
    samples: int
    seed: int


def measure_availability(
    opened: OpenedRun,
    shares: Sequence[float] = SHARES,
    draws: int = 5,
    samples: int = 1000,
    seed: int = 0,
    name: str | None = None,
) -> Availability:
    """Ask a trained run about its test side with fewer and fewer answers, with and without the photograph.

    Args:
        opened: the run. Of a method that reads no photograph, or no form, only what it reads is taken away.
        shares: of the recorded answers that are kept; ascending, the last is 1.
        draws: choices of answers for each share between 0 and 1.
        samples: bootstrap samples, drawn over patients.
        seed: of choices and bootstrap.
        name: of the run, for people; None: its method's.

    Raises:
        ValueError: `shares` aren't ascending within 0..1 or don't end with 1, or `draws` or `samples` is below 1.
    """
    shares = list(shares)
    if not shares or shares[-1] != 1 or shares[0] < 0 or any(one >= other for one, other in pairwise(shares)):
        raise ValueError(f"shares must ascend within 0..1 and end with 1, not {shares}")
    if draws < 1:
        raise ValueError(f"draws must be at least 1, not {draws}")
    rows, schema = opened.rows("test"), opened.dataset.schema
    recorded = rows[[field.name for field in schema.fields]].notna().to_numpy()
    patterns = find_patterns(opened.rows("train"), schema)
    asked: dict[str, list[NDArray[np.bool_]]] = {}
    orders = draw_orders(opened, draws, seed)
    for share in shares:
        # Nothing and everything can be chosen in one way only.
        asked[_share(share)] = [keep_share(recorded, order, share) for order in (orders[:1] if share in (0, 1) else orders)]
    for pattern in patterns:
        asked[_without(pattern.fields)] = [recorded & ~np.isin([field.name for field in schema.fields], pattern.removed)]
    answers = _ask(opened, rows, asked)
    examples_ids = tuple(rows["image_id"])
    groups = opened.groups.loc[list(examples_ids)].to_numpy(dtype=object)
    labels = rows["label"].map({label: index for index, label in enumerate(opened.classes)}).to_numpy(dtype=np.int64)
    with progress_bar("intervals") as show:
        bootstrap = _slim(pooled_bootstrap(labels, answers, groups, opened.classes, samples, seed, LEVEL, progress=show))
    kept = {key: float(np.mean([part.sum(axis=1).mean() for part in parts])) for key, parts in asked.items()}
    curve, named = [], []
    for photograph in (WITH, WITHOUT):
        if _key(photograph, _share(1)) not in answers:
            continue
        for share in shares:
            start: dict[str, object] = {"photograph": photograph, "share": share, "answers_kept": kept[_share(share)]}
            curve += _measured(bootstrap, photograph, _share(share), start | {"draws": len(asked[_share(share)])})
        for pattern in patterns:
            start = {"photograph": photograph, "pattern": pattern.name, "removed": pattern.fields}
            start |= {"training_share": pattern.training_share, "answers_kept": kept[_without(pattern.fields)]}
            named += _measured(bootstrap, photograph, _without(pattern.fields), start)
    unit = schema.unit
    return Availability(
        name or opened.model.title, pd.DataFrame(curve), pd.DataFrame(named), 1 / len(np.unique(labels)), bootstrap, examples_ids,
        tuple(map(str, groups)), len(schema.fields), unit, draws, samples, seed,
    )  # fmt: skip


def compare_availability(first: Availability, second: Availability) -> pd.DataFrame:
    """Compare two runs at every share and pattern, on the same images, with the same answers and the same resamples.

    A run that reads no photograph answers the same with one as without: that answer is set beside the other's with a photograph.

    Returns:
        One row a question and measure: photograph, share (NaN for a pattern), pattern and removed (empty for a share), measure, first,
        second, difference (first - second), low, high.

    Raises:
        DataError: they weren't asked about the same images, or with other draws, samples or seed.
    """
    for what, own, others in (
        ("test images", first.image_ids, second.image_ids),
        ("patients", first.groups, second.groups),
        ("draws, samples and seed", (first.draws, first.samples, first.seed), (second.draws, second.samples, second.seed)),
    ):
        if own != others:
            raise DataError(f"{first.name} and {second.name} don't have the same {what}, so they can't be compared in pairs")
    questions = [(_share(share), share, "", "") for share in first.curve["share"].unique()]
    named = first.patterns.drop_duplicates("removed")
    questions += [(_without(removed), np.nan, name, removed) for removed, name in zip(named["removed"], named["pattern"], strict=True)]
    rows = []
    for photograph in (WITH, WITHOUT):
        for question, share, pattern, removed in questions:
            one, other = (_found(run.bootstrap, photograph, question) for run in (first, second))
            if one is None or other is None:
                continue
            for measure in MEASURES:
                values = first.bootstrap.points[one][measure], second.bootstrap.points[other][measure]
                drawn = first.bootstrap.drawn[one][measure] - second.bootstrap.drawn[other][measure]
                low, high = percentile_interval(drawn, LEVEL) or (np.nan, np.nan)
                rows.append(
                    {
                        **{"photograph": photograph, "share": share, "pattern": pattern, "removed": removed, "measure": measure},
                        **{"first": values[0], "second": values[1], "difference": values[0] - values[1], "low": low, "high": high},
                    }
                )
    return pd.DataFrame(rows)


def draw_orders(opened: OpenedRun, draws: int, seed: int) -> NDArray[np.float64]:
    """Draw in which order each test row loses its answers, and how a part of an answer is rounded: (draws, N, F + 1) in 0..1.

    Drawn for all rows of the data set, so that every run of it gets the same.
    """
    table = opened.dataset.table
    numbers = np.random.default_rng(seed).random((draws, len(table), len(opened.dataset.schema.fields) + 1))
    places = pd.Index(table["image_id"]).get_indexer(pd.Index(opened.rows("test")["image_id"]))
    return np.asarray(numbers[:, places])


def keep_share(recorded: NDArray[np.bool_], order: NDArray[np.float64], share: float) -> NDArray[np.bool_]:
    """Return which of the recorded answers are kept; a larger share keeps those of a smaller one.

    Args:
        recorded: (N, F).
        order: (N, F + 1) of `draw_orders`: of each row the answers with the smallest numbers are kept longest, and the last number
            rounds: half an answer is one for half of the rows, so that on average exactly the share is kept.
        share: in 0..1.
    """
    rank = np.where(recorded, order[:, :-1], np.inf).argsort(axis=1, kind="stable").argsort(axis=1, kind="stable")
    wanted = np.floor(share * recorded.sum(axis=1) + order[:, -1])
    return np.asarray(recorded & (rank < wanted[:, None]))


def _ask(opened: OpenedRun, rows: pd.DataFrame, asked: Mapping[str, Sequence[NDArray[np.bool_]]]) -> dict[str, list[Floats]]:
    """Ask with what is kept of each row's answers; `photograph question` -> answers, one a draw."""
    examples = opened.pictures("test")
    names = [field.name for field in opened.dataset.schema.fields]
    forms: list[Forms] = []
    if opened.reads_metadata:
        with progress_bar("removing answers") as show:
            total = sum(map(len, asked.values()))
            for kept in (part for parts in asked.values() for part in parts):
                forms.append(opened.metadata.encode(keep_answers(rows, names, kept)).values)
                show(len(forms), total)
    else:
        forms = [examples.metadata]
    found: dict[str, list[Floats]] = {}
    if opened.model.reads_image:
        with progress_bar("asking with fewer answers") as show:
            found[WITH] = ask_with_forms(opened, examples, forms, show).answers
    if opened.reads_metadata:
        with progress_bar("asking without photograph") as show:
            found[WITHOUT] = ask_without_photograph(opened, forms, show)
    answers = {}
    for photograph, given in found.items():
        remaining = iter(given)
        for question, parts in asked.items():
            # A run that reads no form gives the same answer whatever is kept of it.
            answers[_key(photograph, question)] = [next(remaining) for _ in parts] if opened.reads_metadata else given
    return answers


def _measured(bootstrap: PooledBootstrap, photograph: str, question: str, start: dict[str, object]) -> list[dict[str, object]]:
    """Return a row a measure, `start` first."""
    rows, key, whole = [], _key(photograph, question), _key(photograph, _share(1))
    for measure in MEASURES:
        value, difference = bootstrap.value(key, measure), bootstrap.difference(key, whole, measure)
        rows.append(
            {
                **start,
                **{"measure": measure, "value": value.value, "low": value.low, "high": value.high},
                **{"difference": difference.difference, "difference_low": difference.low, "difference_high": difference.high},
            }
        )
    return rows


def _slim(bootstrap: PooledBootstrap) -> PooledBootstrap:
    """Return a bootstrap of the measures that are looked at, which is kept in memory for comparisons."""
    points = {key: {measure: values[measure] for measure in MEASURES} for key, values in bootstrap.points.items()}
    drawn = {key: {measure: values[measure] for measure in MEASURES} for key, values in bootstrap.drawn.items()}
    return PooledBootstrap(points, drawn, bootstrap.groups, bootstrap.images, bootstrap.samples, bootstrap.level)


def _found(bootstrap: PooledBootstrap, photograph: str, question: str) -> str | None:
    """Return the key of a question, for a run without photographs the same with and without; None if the run wasn't asked it."""
    reads_image = any(key.startswith(f"{WITH}:") for key in bootstrap.points)
    key = _key(photograph if reads_image else WITHOUT, question)
    return key if key in bootstrap.points else None


def _share(share: float) -> str:
    return f"share {share:g}"


def _without(removed: str) -> str:
    return f"without {removed}" if removed else _share(1)


def _key(photograph: str, question: str) -> str:
    return f"{photograph}: {question}"
