"""The out-of-distribution score of a run: fitted when it is evaluated, measured against images without a lesion, drawn.

The score itself is `dualrefnet.runtime.out_of_distribution`: two squared Mahalanobis distances of the image encoders'
vector from those of the training images, over a limit that a known share of the validation images exceeds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import ArrayLike, NDArray

from dualrefnet.analysis.non_lesion_images import (
    DOCUMENTS,
    MEDICAL,
    PHOTOGRAPHS,
    PLAIN,
    crop_skin,
    everyday_images,
    medical_images,
)
from dualrefnet.analysis.opened_run import OpenedRun, sample_rows
from dualrefnet.display.figure import INK, PRIMARY, SECONDARY, ReportFigure, beeswarm_offsets, new_figure, styled
from dualrefnet.errors import DataError
from dualrefnet.evaluation.bootstrap import NAN, Bootstrap, Estimate, Floats, group_codes, percentile_interval
from dualrefnet.evaluation.metrics import Ranking
from dualrefnet.files import write_tensors
from dualrefnet.models.cross_fitted import CrossFitted
from dualrefnet.models.inference import joined_vectors, normalise, to_unit
from dualrefnet.progress import track
from dualrefnet.runtime.out_of_distribution import (
    FORMAT,
    QUANTILES,
    Distance,
    OutOfDistributionScore,
    prefixes,
    root_shares,
)
from dualrefnet.runtime.preprocessing import preprocess

# Directions kept of each distance, at most; with few images at most half as many as there are.
DIRECTIONS = 64
# Share of the validation images beyond the limit: the intended rate of false alarms.
FALSE_ALARMS = 0.02
# Training images that the score is fitted on, at most, drawn with the run's seed: more change it little.
AT_MOST = 5000
LEVEL = 0.95
# Of fewer sources no interval is drawn.
FEW_SOURCES = 5
BATCH = 32
LESIONS, EVERYDAY = "test images of lesions", "all of these three"
SKIN, CLOSE_LESION = "healthy skin beside the lesion", "lesion, crop of the same size"


def fit_score(training: NDArray[np.floating], validation: NDArray[np.floating]) -> OutOfDistributionScore:
    """Fit the score on vectors of training images (N, D) and, for scales and limit, of held-out images (V, D)."""
    return fit_scores([(training, validation)])


def fit_scores(members: Sequence[tuple[NDArray[np.floating], NDArray[np.floating]]]) -> OutOfDistributionScore:
    """Fit the score of a model of several members, each on vectors of its own; see `fit_score`. The limit is common."""
    distances, measured, training = [], [], 0
    for both in members:
        train, held_out = (np.asarray(rows, dtype=np.float64)[np.isfinite(rows).all(axis=1)] for rows in both)
        if min(len(train), len(held_out)) < 2 or train.shape[1] != held_out.shape[1]:
            shapes = f"{train.shape} and {held_out.shape}"
            raise ValueError(f"an out-of-distribution score needs 2 vectors of one length in each split, not {shapes}")
        vector = _fit_distance(train, held_out)
        shares = _fit_distance(root_shares(train), root_shares(held_out))
        distances.append((vector, shares))
        measured.append(vector.measure(held_out) + shares.measure(root_shares(held_out)))
        training = max(training, len(train))
    scores = np.sort(np.concatenate(measured))
    # The smallest score beyond which at most that share of new images is expected (split conformal); the largest if
    # they are few.
    rank = min(int(np.ceil((1 - FALSE_ALARMS) * (len(scores) + 1))), len(scores))
    limit = float(max(scores[rank - 1], np.finfo(np.float32).tiny))
    quantiles = np.quantile(scores / limit, np.linspace(0, 1, QUANTILES)).astype(np.float32)
    return OutOfDistributionScore(tuple(distances), limit, quantiles, training, len(scores))


def _fit_distance(train: Floats, held_out: Floats) -> Distance:
    """Fit one distance on (N, D) and its scale on (V, D)."""
    number, length = train.shape
    mean = train.mean(axis=0)
    centred = train - mean
    # Of the smaller of the two product matrices, whose eigenvalues are the same.
    few = number <= length
    product = centred @ centred.T if few else centred.T @ centred
    values, vectors = np.linalg.eigh(product / number)
    values, vectors = values[::-1], vectors[:, ::-1]
    total, squares = float(np.trace(product)) / number, float(np.square(values).sum())
    even = total / length
    # Ledoit and Wolf 2004, section 3.3: how far the sample's covariance is shrunk towards `even` times the identity.
    dispersion = squares - total**2 / length
    noise = (np.square(np.square(centred).sum(axis=1)).mean() - squares) / number
    shrink = float(np.clip(noise / dispersion, 0, 1)) if dispersion > 0 else 1.0
    kept = min(DIRECTIONS, number // 2, length - 1, int((values > 1e-9 * max(values[0], 1e-300)).sum()))
    values, vectors = values[:kept], vectors[:, :kept]
    directions = (vectors.T @ centred) / np.sqrt(number * values)[:, None] if few else vectors.T
    variances = (1 - shrink) * values + shrink * even
    # All vectors equal: any other is infinitely far, which is written as very far.
    rest = max((total - float(variances.sum())) / (length - kept), 1e-12 * max(even, 1e-12))
    fitted = Distance(mean.astype(np.float32), directions.astype(np.float32), variances.astype(np.float32), rest, 1.0)
    scale = float(fitted.measure(held_out).std())
    return Distance(fitted.mean, fitted.directions, fitted.variances, rest, scale if scale > 0 else 1.0)


def save_score(score: OutOfDistributionScore, path: Path) -> None:
    """Write what `OutOfDistributionScore.load` reads: a safetensors file, single numbers in its header."""
    tensors = {"quantiles": score.quantiles}
    header = {"format": FORMAT, "limit": repr(score.limit)}
    header |= {"training": str(score.training), "validation": str(score.validation)}
    if len(score.distances) > 1:
        header["members"] = str(len(score.distances))
    parts = [
        (prefix + name, part)
        for prefix, pair in zip(prefixes(len(score.distances)), score.distances, strict=True)
        for name, part in zip(("vector", "shares"), pair, strict=True)
    ]
    for name, part in parts:
        tensors |= {f"{name}.mean": part.mean, f"{name}.directions": part.directions}
        tensors[f"{name}.variances"] = part.variances
        header |= {f"{name}.rest": repr(part.rest), f"{name}.scale": repr(part.scale)}
    header["description"] = (
        "Squared Mahalanobis distances of the image encoders' vector and of the roots of its shares, each over its "
        f"scale, added and divided by the limit; beyond 1 lie {FALSE_ALARMS:.0%} of the validation images."
    )
    contiguous = {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in tensors.items()}
    write_tensors(path, contiguous, header)


def fit_run(opened: OpenedRun, validation: NDArray[np.float32], test: NDArray[np.float32] | None) -> dict[str, Any]:
    """Fit the score on the training images, write `out_of_scope.safetensors`, return its part of metrics.json."""
    examples, seed = opened.examples("train"), opened.recipe.seed
    members = []
    for fit in opened.fits(examples, len(validation)):
        rows = fit.rows
        if len(rows) > AT_MOST:
            rows = np.sort(np.random.default_rng(seed).choice(rows, AT_MOST, replace=False))
        members.append((opened.vectors(fit.train, rows, "out-of-distribution score"), validation[fit.tested]))
    score = fit_scores(members)
    save_score(score, opened.run.out_of_scope_file)
    fitted = {"training": score.training, "validation": score.validation, "intended_false_alarm_rate": FALSE_ALARMS}
    if test is None:
        return fitted
    flagged = score_rows(score, test, examples.folds) > 1
    rate = _flagged_share(flagged, opened.patients("test"), opened.recipe.evaluation.bootstrap, seed)
    return {
        **fitted,
        "images": len(flagged),
        "false_alarms": int(flagged.sum()),
        **rate.to_json("false_alarm_rate", LEVEL),
    }


def score_rows(score: OutOfDistributionScore, vectors: NDArray[np.floating], folds: NDArray[np.int64] | None) -> Floats:
    """Return the score (N,) of vectors; with `folds` (N,) they are of those members of a cross-fitted run."""
    if folds is None:
        return score.score(vectors)
    scores = np.empty(len(vectors))
    for fold in np.unique(folds):
        scores[folds == fold] = score.member_score(vectors[folds == fold], int(fold))
    return scores


@dataclass(frozen=True)
class OutOfDistributionMeasured:
    """How well the score separates other images from test images of lesions, by image and by group."""

    scores: pd.DataFrame
    table: pd.DataFrame
    skin_auroc: Estimate | None  # healthy skin, equally large crops of the lesion; None: no masks
    training: int  # images that the score was fitted on
    validation: int  # images that set the limit
    images: int  # test images, all or a sample
    samples: int
    seed: int


def measure_out_of_distribution(
    opened: OpenedRun, masks: Path | None = None, images: int = 500, samples: int = 1000, seed: int = 0
) -> OutOfDistributionMeasured:
    """Measure the run's score against everyday images that it was not chosen with, and harder groups."""
    if not opened.model.reads_image:
        raise DataError("this method reads no image, so there is nothing to score")
    score = opened.run.out_of_scope
    examples, rows = opened.image_examples("test"), opened.rows("test")
    groups = pd.Series(opened.patients("test"), rows["image_id"])
    chosen = sample_rows(examples.labels, images, seed)
    found = opened.masks(masks)
    files = dict(zip(rows["image_id"].iloc[chosen], rows["image_path"].iloc[chosen], strict=True))
    with_mask = [image_id for image_id in files if image_id in found]
    others = [*everyday_images(seed), *medical_images(seed)]

    def table(group: str | list[str], source: Sequence[str] | pd.Series, vectors: NDArray[np.float32]) -> pd.DataFrame:
        # Of a cross-fitted run a lesion is read by the one member that hasn't been trained on it, and so is any other
        # image, by the members in turn: the scores are of one kind.
        folds = None if examples.folds is None else np.arange(len(vectors)) % len(score.distances)
        if group == LESIONS and examples.folds is not None:
            folds = examples.folds[chosen]
        return pd.DataFrame({"group": group, "source": list(source), "score": score_rows(score, vectors, folds)})

    parts = [table(LESIONS, groups.loc[list(files)], opened.vectors(examples, chosen, "test images"))]
    for start in track(range(0, len(others), BATCH), "images without a lesion"):
        part = others[start : start + BATCH]
        vectors = _encode(opened, [item.pixels for item in part])
        parts.append(table([item.group for item in part], [item.source for item in part], vectors))
    for image_id in track(with_mask, "skin beside lesions"):
        crops = crop_skin(Path(files[image_id]), found[image_id])
        if crops is not None:
            parts.append(table([SKIN, CLOSE_LESION], [groups[image_id]] * 2, _encode(opened, crops)))
    scores = pd.concat(parts, ignore_index=True)
    skin, close = (scores[scores["group"] == name] for name in (SKIN, CLOSE_LESION))
    return OutOfDistributionMeasured(
        scores,
        summarise(scores, samples, seed),
        _auroc(close, skin, samples, seed) if len(skin) else None,
        score.training,
        score.validation,
        len(chosen),
        samples,
        seed,
    )


@torch.inference_mode()
def _encode(opened: OpenedRun, images: Sequence[NDArray[np.uint8]]) -> NDArray[np.float32]:
    """Preprocess images as uploads are and return their vectors, (N, D)."""
    section = opened.recipe.image
    ready = np.stack([preprocess(image, section) for image in images])
    batch = torch.from_numpy(ready).permute(0, 3, 1, 2).to(opened.device)
    pixels = normalise(to_unit(batch, section.size), opened.normalisation)
    if isinstance(opened.model, CrossFitted):
        members = torch.arange(len(pixels), device=opened.device) % len(opened.model.members)
        return joined_vectors(opened.model.encode_held_out(pixels, members))
    return joined_vectors(opened.model.encode(pixels))


def summarise(scores: pd.DataFrame, samples: int, seed: int) -> pd.DataFrame:
    everyday = (PHOTOGRAPHS, DOCUMENTS, PLAIN)
    members = {name: (name,) for name in (LESIONS, *everyday)} | {EVERYDAY: everyday}
    members |= {name: (name,) for name in (MEDICAL, SKIN, CLOSE_LESION)}
    lesions, rows = scores[scores["group"] == LESIONS], []
    for name, kinds in members.items():
        part = scores[scores["group"].isin(kinds)]
        if part.empty:
            continue
        auroc = Estimate(NAN) if name == LESIONS else _auroc(lesions, part, samples, seed)
        flagged = _flagged_share((part["score"] > 1).to_numpy(), part["source"], samples, seed)
        counts = {"group": name, "pictures": len(part), "sources": part["source"].nunique()}
        rows.append(counts | auroc.columns("auroc") | flagged.columns("flagged"))
    return pd.DataFrame(rows)


def _flagged_share(flagged: NDArray[np.bool_], groups: ArrayLike, samples: int, seed: int) -> Estimate:
    """Return a share with its interval over resampled groups; without one for fewer than `FEW_SOURCES` groups."""
    if len(pd.unique(np.asarray(groups))) < FEW_SOURCES:
        return Estimate(float(flagged.mean()))
    (share,) = Bootstrap(groups, samples, seed).ratios(flagged[:, None], np.ones((len(flagged), 1)))
    return share


def _auroc(lesions: pd.DataFrame, others: pd.DataFrame, samples: int, seed: int) -> Estimate:
    """Return how often another image scores higher than a lesion; patients and sources are resampled apart."""
    both = pd.concat([lesions, others])
    codes = group_codes(both["source"])
    patients = int(codes[: len(lesions)].max()) + 1
    sources = int(codes.max()) + 1 - patients
    ranking = Ranking.of(both["score"].to_numpy(), np.arange(len(both)) >= len(lesions), codes)
    value = float(ranking.auc(np.ones((1, patients + sources)))[0])
    if min(patients, sources or patients) < FEW_SOURCES:
        return Estimate(value)
    parts = [(patients, seed), (sources, seed + 1)] if sources else [(patients, seed)]
    weights = [Bootstrap(np.arange(size), samples, of).resample(lambda drawn: drawn) for size, of in parts]
    return Estimate(value, *(percentile_interval(ranking.auc(np.hstack(weights)), LEVEL) or ()))


# Values at which the scale may have a tick, and the width of a column of dots in powers of ten, as a share of the axis.
TICKS, COLUMN = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000), 0.012


@styled
def draw_out_of_distribution(measured: OutOfDistributionMeasured) -> ReportFigure:
    from matplotlib.ticker import FixedLocator, NullFormatter, NullLocator

    rows = [row for row in measured.table.to_dict("records") if row["group"] != EVERYDAY]
    scores = measured.scores.assign(score=measured.scores["score"].clip(lower=1e-3))
    low, high = 0.93 * float(scores["score"].min()), 1.07 * float(scores["score"].max())
    figure, axes = new_figure(0.45 + 0.55 * len(rows), len(rows), 1, sharex=True)
    width = COLUMN * float(np.log10(high / low))
    texts = []
    for axis, row in zip(axes, rows, strict=True):
        values = scores.loc[scores["group"] == row["group"], "score"].to_numpy()
        marker, size, colour = ("D", 2.0, SECONDARY)
        if row["group"] in (LESIONS, CLOSE_LESION):
            marker, size, colour = ("o", 2.2, PRIMARY)
        offsets = beeswarm_offsets(np.log10(values).astype(np.float32), width)
        style: dict[str, Any] = {"markersize": size, "color": colour, "markeredgewidth": 0, "alpha": 0.75}
        axis.plot(values, offsets, marker, clip_on=False, **style)
        axis.axvline(1, color=INK, linewidth=1)
        axis.set(xscale="log", xlim=(low, max(high, 1.2)), ylim=(-0.5, 0.5), yticks=[])
        axis.spines["left"].set_visible(False)
        axis.grid(axis="y", visible=False)
        flagged = f"{row['flagged']:.1%} flagged"
        text = flagged if pd.isna(row["auroc"]) else f"AUROC {row['auroc']:.3f}, {flagged}"
        axis.set_title(str(row["group"]), fontsize=7.5, fontweight="normal", pad=2)
        axis.set_title(text, fontsize=7.5, fontweight="normal", loc="right", pad=2)
        axis.tick_params(axis="x", which="both", length=0)
        texts.append(f"{row['group']}: {row['pictures']} images, {text}")
    scale = axes[-1].xaxis
    scale.set_major_locator(FixedLocator([tick for tick in TICKS if low <= tick <= high]))
    scale.set_minor_locator(NullLocator())
    scale.set_minor_formatter(NullFormatter())
    scale.set_major_formatter(lambda value, _: f"{value:g}")
    axes[-1].set_xlabel("out-of-distribution score; beyond 1 an image is flagged")
    caption = (
        f"One dot an image, round for lesions. {FALSE_ALARMS:.0%} of {measured.validation} validation images exceed "
        "the limit (line). AUROC: how often an image of the group scores higher than a test image of a lesion (0.5 is "
        f"chance). {measured.images} test images; the other images are of sources that the score wasn't chosen with "
        f"(seed {measured.seed})."
    )
    # Sources are patients, too; and the order of the rows would reveal which of them are of one.
    data = measured.scores.drop(columns="source").sort_values(["group", "score"], ignore_index=True)
    return ReportFigure("out_of_scope", "Out-of-distribution scores", caption, "; ".join(texts), figure, data)
