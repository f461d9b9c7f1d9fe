"""Fit the score that tells how unlike the photographs that a model was trained on a picture is; see
`dualrefnet.runtime.out_of_distribution`.
"""

# also: The out-of-scope score of a run: fitted when it is evaluated, and measured against pictures that show no lesion.
# also: How unlike the training photographs pictures of several kinds are: one strip of dots a kind, with the limit.

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import pandas as pd
import torch
from matplotlib.ticker import FixedLocator, NullFormatter, NullLocator
from numpy.typing import ArrayLike, NDArray

from dualrefnet.analysis.non_lesion_images import (
    DOCUMENTS,
    MEDICAL,
    PHOTOGRAPHS,
    PLAIN,
    cut_skin,
    everyday_pictures,
    medical_pictures,
)
from dualrefnet.analysis.opened_run import OpenedRun, sample_rows
from dualrefnet.display.figure import INK, PRIMARY, SECONDARY, ReportFigure, beeswarm_offsets, new_figure, styled
from dualrefnet.errors import DataError, RunError
from dualrefnet.evaluation.bootstrap import draw_counts, group_codes, percentile_interval, wilson_interval
from dualrefnet.evaluation.metrics import Ranking
from dualrefnet.files import write_tensors
from dualrefnet.models.inference import joined_vectors, normalise, to_unit
from dualrefnet.runtime.out_of_distribution import FORMAT, QUANTILES, Distance, OutOfDistributionScore, root_shares
from dualrefnet.runtime.preprocessing import preprocess

Floats = NDArray[np.float64]


# Directions kept of each distance, at most; with few photographs at most half as many as there are.
DIRECTIONS = 64


# Share of the validation photographs beyond the limit: the rate of false alarms that is meant.
FALSE_ALARMS = 0.02


@dataclass(frozen=True)
class OutOfScope(OutOfDistributionScore):
    """A fitted score with its file; make one with `fit_out_of_scope` or `OutOfScope.load`."""

    def save(self, path: Path) -> None:
        """Write a safetensors file with the numbers, and the single ones in its header."""
        tensors = {"quantiles": self.quantiles}
        header = {
            "format": FORMAT,
            "limit": repr(self.limit),
            "training": str(self.training),
            "validation": str(self.validation),
        }
        for name, part in (("vector", self.vector), ("shares", self.shares)):
            tensors |= {
                f"{name}.mean": part.mean,
                f"{name}.directions": part.directions,
                f"{name}.variances": part.variances,
            }
            header |= {f"{name}.rest": repr(part.rest), f"{name}.scale": repr(part.scale)}
        header["description"] = (
            "Squared Mahalanobis distances of the image encoders' vector and of the roots of its shares, each over its scale, added and "
            f"divided by the limit; beyond 1 lie {FALSE_ALARMS:.0%} of the validation photographs."
        )
        write_tensors(
            path, {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in tensors.items()}, header
        )

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what `save` has written.

        Raises:
            RunError: the file is missing, damaged or of another version.
        """
        try:
            return super().load(path)
        except (OSError, ValueError) as error:
            raise RunError(
                f"{path} can't be read ({error}); make it again with `dualrefnet evaluate {path.parent}`"
            ) from None


def fit_out_of_scope(training: NDArray[np.floating], validation: NDArray[np.floating]) -> OutOfScope:
    """Fit the score.

    Args:
        training: (N, D) vectors of training photographs; rows that aren't finite are left out.
        validation: (V, D) of photographs that weren't trained on; they set scales and limit, since the network has made
            room for
            those that it was trained on.

    Raises:
        ValueError: fewer than 2 rows are finite on a side, or the sides differ in D.
    """
    train, held_out = (
        np.asarray(side, dtype=np.float64)[np.isfinite(side).all(axis=1)] for side in (training, validation)
    )
    if min(len(train), len(held_out)) < 2 or train.shape[1] != held_out.shape[1]:
        raise ValueError(
            f"an out-of-scope score needs 2 vectors of one length on each side, not {train.shape} and {held_out.shape}"
        )
    vector = _fit_distance(train, held_out)
    shares = _fit_distance(root_shares(train), root_shares(held_out))
    scores = np.sort(vector.measure(held_out) + shares.measure(root_shares(held_out)))
    # The smallest score beyond which at most that share of new photographs is expected (split conformal); the largest
    # if they are few.
    place = min(int(np.ceil((1 - FALSE_ALARMS) * (len(scores) + 1))), len(scores))
    limit = float(max(scores[place - 1], np.finfo(np.float32).tiny))
    quantiles = np.quantile(scores / limit, np.linspace(0, 1, QUANTILES)).astype(np.float32)
    return OutOfScope(vector, shares, limit, quantiles, len(train), len(held_out))


def _fit_distance(train: Floats, held_out: Floats) -> Distance:
    """Fit one distance on (N, D) and its scale on (V, D)."""
    number, length = train.shape
    mean = train.mean(axis=0)
    centred = train - mean
    # Of the smaller of the two product matrices, whose eigenvalues are the same.
    few = number <= length
    values, vectors = np.linalg.eigh((centred @ centred.T if few else centred.T @ centred) / number)
    values, vectors = values[::-1], vectors[:, ::-1]
    total, squares = (
        float(np.trace(centred @ centred.T if few else centred.T @ centred)) / number,
        float(np.square(values).sum()),
    )
    even = total / length
    # Ledoit and Wolf 2004, section 3.3: how far the sample's covariance is shrunk towards `even` times the identity.
    spread = squares - total**2 / length
    noise = (np.square(np.square(centred).sum(axis=1)).mean() - squares) / number
    shrink = float(np.clip(noise / spread, 0, 1)) if spread > 0 else 1.0
    kept = min(DIRECTIONS, number // 2, length - 1, int((values > 1e-9 * max(values[0], 1e-300)).sum()))
    values, vectors = values[:kept], vectors[:, :kept]
    directions = (vectors.T @ centred) / np.sqrt(number * values)[:, None] if few else vectors.T
    variances = (1 - shrink) * values + shrink * even
    # All vectors equal: any other is infinitely far, which is written as very far.
    rest = max((total - float(variances.sum())) / (length - kept), 1e-12 * max(even, 1e-12))
    fitted = Distance(mean.astype(np.float32), directions.astype(np.float32), variances.astype(np.float32), rest, 1.0)
    scale = float(fitted.measure(held_out).std())
    return Distance(fitted.mean, fitted.directions, fitted.variances, rest, scale if scale > 0 else 1.0)


Progress = Callable[[int, int], None]


# Training photographs that the score is fitted on, at most, drawn with the run's seed: reading more takes longer than
# it is worth.
AT_MOST = 5000


# Of fewer sources no interval is drawn.
FEW_SOURCES = 5


LESIONS, EVERYDAY = "test photographs of lesions", "all of these three"


SKIN, CLOSE_LESION = "skin beside the lesion", "lesion cut out as large"


BATCH = 32


def fit_run(
    opened: OpenedRun, validation: NDArray[np.float32], test: NDArray[np.float32], progress: Progress | None = None
) -> dict[str, Any]:
    """Fit the score on the training photographs, write `out_of_scope.safetensors`, and return what goes into
    metrics.json.

    Args:
        opened: the run; its method reads images.
        validation: vectors of the validation side, in its order.
        test: of the test side.
        progress: called with (training photographs read, in all).

    Returns:
        `training` and `validation` (photographs), `intended_false_alarm_rate`, and of the test side `images`,
        `false_alarms` and
        `false_alarm_rate` with its interval over patients.
    """
    examples = opened.examples("train")
    rows = np.arange(len(examples))
    if len(rows) > AT_MOST:
        rows = np.sort(np.random.default_rng(opened.recipe.seed).choice(len(rows), AT_MOST, replace=False))
    score = fit_out_of_scope(opened.vectors(examples, rows, progress), validation)
    score.save(opened.run.out_of_scope_file)
    flagged = score.score(test) > 1
    wanted = opened.recipe.evaluation.bootstrap
    result: dict[str, Any] = {
        "training": score.training,
        "validation": score.validation,
        "intended_false_alarm_rate": FALSE_ALARMS,
        "images": len(flagged),
        "false_alarms": int(flagged.sum()),
        "false_alarm_rate": float(flagged.mean()),
    }
    groups = opened.groups.loc[opened.rows("test")["image_id"]]
    if wanted and groups.nunique() >= FEW_SOURCES:
        result["false_alarm_rate_ci95"] = list(share_interval(flagged, groups, wanted, opened.recipe.seed))
    return result


@dataclass(frozen=True)
class OutOfScopeMeasured:
    """How well the score tells other pictures from test photographs of lesions.

    Attributes:
        scores: a row a picture: `group`, `source` (patient or file), `score` (more than 1 warns).
        table: a row a group: `group`, `pictures`, `sources`, `auroc` against the test photographs (NaN for these),
            `flagged` (share
            beyond the limit), and both with `_low` and `_high` (NaN where there are fewer than `FEW_SOURCES` sources).
        skin_auroc: of skin against lesions cut out as large, with its interval; None if there are no masks.
        training: photographs that the score was fitted on.
        validation: photographs that set the limit.
        images: test photographs, of all or a sample.
        samples: resamples.
        seed: of sample, pictures and resamples.
    """

    scores: pd.DataFrame
    table: pd.DataFrame
    skin_auroc: tuple[float, float, float] | None
    training: int
    validation: int
    images: int
    samples: int
    seed: int


def measure_out_of_scope(
    opened: OpenedRun,
    masks: Path | None = None,
    images: int = 500,
    samples: int = 1000,
    seed: int = 0,
    progress: Progress | None = None,
) -> OutOfScopeMeasured:
    """Measure the run's score against the half of the everyday pictures that it was not chosen with, and harder groups.

    Args:
        opened: the run; its method reads images.
        masks: folder of lesion masks; None: `masks` in the data set's folder, and no skin if there is none.
        images: test photographs to look at, each class in proportion.
        samples: bootstrap samples, of patients and of the other pictures' sources.
        seed: of all that is drawn.
        progress: called with (pictures read, in all).

    Raises:
        RunError: the run has no out-of-scope score.
        DataError: `masks` was named and isn't a folder of masks; the method reads no image.
    """
    if not opened.model.reads_image:
        raise DataError("this method reads no photograph, so there is nothing to score")
    score = opened.run.out_of_scope
    examples, rows = opened.pictures("test"), opened.rows("test")
    chosen = sample_rows(examples.labels, images, seed)
    outlined = opened.masks(masks)
    files = dict(zip(rows["image_id"].iloc[chosen], rows["image_path"].iloc[chosen], strict=True))
    with_mask = [image_id for image_id in files if image_id in outlined]
    others = [*everyday_pictures("reporting", seed), *medical_pictures(seed)]
    total = len(chosen) + len(others) + len(with_mask)

    def show(before: int) -> Progress:
        return lambda done, _: progress(before + done, total) if progress is not None else None

    groups = opened.groups
    parts = [_rows(LESIONS, groups.loc[list(files)], score.score(opened.vectors(examples, chosen, show(0))))]
    values = score.score(np.concatenate([*_encode(opened, [item.pixels for item in others], show(len(chosen)))]))
    everyday = _rows([item.group for item in others], [item.source for item in others], values)
    parts.append(everyday)
    for number, image_id in enumerate(with_mask, 1):
        cuttings = cut_skin(Path(files[image_id]), outlined[image_id])
        if cuttings is not None:
            pair = score.score(np.concatenate([*_encode(opened, [cuttings.skin, cuttings.lesion], None)]))
            parts.append(_rows([SKIN, CLOSE_LESION], [groups[image_id]] * 2, pair))
        show(len(chosen) + len(others))(number, total)
    scores = pd.concat(parts, ignore_index=True)
    skin, close = (scores[scores["group"] == name] for name in (SKIN, CLOSE_LESION))
    return OutOfScopeMeasured(
        scores,
        summarise(scores, samples, seed),
        _auroc(close, skin, samples, seed) if len(skin) else None,
        score.training,
        score.validation,
        len(chosen),
        samples,
        seed,
    )


def summarise(scores: pd.DataFrame, samples: int, seed: int) -> pd.DataFrame:
    """Return the `table` of `OutOfScopeMeasured` for its `scores`."""
    lesions, rows = scores[scores["group"] == LESIONS], []
    members = {name: (name,) for name in (LESIONS, PHOTOGRAPHS, DOCUMENTS, PLAIN)} | {
        EVERYDAY: (PHOTOGRAPHS, DOCUMENTS, PLAIN)
    }
    members |= {name: (name,) for name in (MEDICAL, SKIN, CLOSE_LESION)}
    for name, kinds in members.items():
        part = scores[scores["group"].isin(kinds)]
        if part.empty:
            continue
        flagged = (part["score"] > 1).to_numpy()
        auroc = (np.nan,) * 3 if name == LESIONS else _auroc(lesions, part, samples, seed)
        low, high = share_interval(flagged, part["source"], samples, seed)
        rows.append([name, len(part), part["source"].nunique(), *auroc, flagged.mean(), low, high])
    columns = [
        "group",
        "pictures",
        "sources",
        "auroc",
        "auroc_low",
        "auroc_high",
        "flagged",
        "flagged_low",
        "flagged_high",
    ]
    return pd.DataFrame(rows, columns=columns)


def share_interval(yes: NDArray[np.bool_], groups: ArrayLike, samples: int, seed: int) -> tuple[float, float]:
    """Return the 95% interval of a share over resampled groups.

    Where all or none are yes, every resample says the same; Wilson's interval for as many independent cases as there
    are groups
    then stands in. NaN for fewer than `FEW_SOURCES` groups.
    """
    codes, names = pd.factorize(np.asarray(groups))
    if len(names) < FEW_SOURCES:
        return np.nan, np.nan
    if yes.all() or not yes.any():
        return wilson_interval(len(names) if yes.all() else 0, len(names))
    hits, sizes = np.bincount(codes, yes), np.bincount(codes).astype(float)
    drawn = np.concatenate([(times @ hits) / (times @ sizes) for times in draw_counts(len(names), samples, seed)])
    interval = percentile_interval(drawn, 0.95)
    assert interval is not None
    return interval


def _auroc(lesions: pd.DataFrame, others: pd.DataFrame, samples: int, seed: int) -> tuple[float, float, float]:
    """Return how often another picture scores higher than a lesion, and the interval over patients and sources.

    Patients are drawn from patients and sources from sources; what was cut from patients' photographs is drawn with
    them.
    """
    both = pd.concat([lesions, others])
    codes = group_codes(both["source"])
    patients = int(codes[: len(lesions)].max()) + 1
    apart = int(codes.max()) + 1 - patients
    ranking = Ranking.of(both["score"].to_numpy(), np.arange(len(both)) >= len(lesions), codes)
    value = float(ranking.auc(np.ones((1, patients + apart)))[0])
    if min(patients, apart or patients) < FEW_SOURCES:
        return value, np.nan, np.nan
    streams = [draw_counts(patients, samples, seed)] + ([draw_counts(apart, samples, seed + 1)] if apart else [])
    drawn = np.concatenate([ranking.auc(np.hstack(times)) for times in zip(*streams, strict=True)])
    low, high = percentile_interval(drawn, 0.95) or (np.nan, np.nan)
    return value, low, high


@torch.inference_mode()
def _encode(
    opened: OpenedRun, pictures: Sequence[NDArray[np.uint8]], progress: Progress | None
) -> Iterator[NDArray[np.float32]]:
    """Preprocess pictures as uploads are and give their vectors, a batch at a time."""
    section = opened.recipe.image
    for start in range(0, len(pictures), BATCH):
        ready = np.stack([preprocess(picture, section) for picture in pictures[start : start + BATCH]])
        images = torch.from_numpy(ready).permute(0, 3, 1, 2).to(opened.device)
        yield joined_vectors(opened.model.encode(normalise(to_unit(images, section.size), opened.normalisation)))
        if progress is not None:
            progress(min(start + BATCH, len(pictures)), len(pictures))


def _rows(group: str | list[str], source: Sequence[str] | pd.Series, score: NDArray[np.float64]) -> pd.DataFrame:
    return pd.DataFrame({"group": group, "source": list(source), "score": score})


# Values at which the scale may have a tick, and the width of a column of dots in powers of ten, as a share of the axis.
TICKS, COLUMN = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000), 0.012


@styled
def draw_out_of_scope(measured: OutOfScopeMeasured) -> ReportFigure:
    """Draw the scores, a strip a group.

    Args:
        measured: from `measure_out_of_scope`.
    """
    rows = [row for row in measured.table.to_dict("records") if row["group"] != EVERYDAY]
    scores = measured.scores.assign(score=measured.scores["score"].clip(lower=1e-3))
    low, high = 0.93 * float(scores["score"].min()), 1.07 * float(scores["score"].max())
    figure, axes = new_figure(0.45 + 0.55 * len(rows), len(rows), 1, sharex=True)
    width = COLUMN * float(np.log10(high / low))
    for axis, row in zip(axes, rows, strict=True):
        values = scores.loc[scores["group"] == row["group"], "score"].to_numpy()
        of_lesions = row["group"] in (LESIONS, CLOSE_LESION)
        axis.plot(
            values,
            beeswarm_offsets(np.log10(values).astype(np.float32), width),
            "o" if of_lesions else "D",
            markersize=2.2 if of_lesions else 2,
            color=PRIMARY if of_lesions else SECONDARY,
            markeredgewidth=0,
            alpha=0.75,
            clip_on=False,
        )
        axis.axvline(1, color=INK, linewidth=1)
        axis.set(xscale="log", xlim=(low, max(high, 1.2)), ylim=(-0.5, 0.5), yticks=[])
        axis.spines["left"].set_visible(False)
        axis.grid(axis="y", visible=False)
        axis.set_title(str(row["group"]), fontsize=7.5, fontweight="normal", pad=2)
        axis.set_title(_numbers(row["auroc"], row["flagged"]), fontsize=7.5, fontweight="normal", loc="right", pad=2)
        axis.tick_params(axis="x", which="both", length=0)
    axes[-1].xaxis.set_major_locator(FixedLocator([tick for tick in TICKS if low <= tick <= high]))
    axes[-1].xaxis.set_minor_locator(NullLocator())
    axes[-1].xaxis.set_minor_formatter(NullFormatter())
    axes[-1].xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes[-1].set_xlabel("how unlike the training photographs; beyond 1 it warns")
    caption = (
        f"One dot a picture. At the line, {FALSE_ALARMS:.0%} of {measured.validation} photographs of lesions that were kept for comparison "
        f"lie to the right; round dots are lesions. AUROC: how often a picture of the group lies to the right of a test photograph of a "
        f"lesion (0.5 is chance, 1 always). {measured.images} test photographs; the other pictures are of sources that the score wasn't "
        f"chosen with (seed {measured.seed})."
    )
    words = [f"{row['group']}: {row['pictures']} pictures, {_numbers(row['auroc'], row['flagged'])}" for row in rows]
    # Sources are patients, too; and the order of the rows would tell which of them are of one.
    data = measured.scores.drop(columns="source").sort_values(["group", "score"], ignore_index=True)
    return ReportFigure("out_of_scope", "Which pictures it warns of", caption, "; ".join(words), figure, data)


def _numbers(auroc: float, flagged: float) -> str:
    warned = f"{flagged:.1%} warned of"
    return warned if pd.isna(auroc) else f"AUROC {auroc:.3f}, {warned}"
