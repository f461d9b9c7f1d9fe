"""How well classes are apart in the fused features that are classified: a t-SNE map, silhouette and nearest neighbours,
with intervals over patients.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import ArrayLike, NDArray
from sklearn import config_context
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from sklearn.metrics import pairwise_distances_chunked, silhouette_samples
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]  # comes with scikit-learn

from dualrefnet.analysis.disagreement import shared_images
from dualrefnet.analysis.opened_run import OpenedRun, Progress, in_batches, sample_rows
from dualrefnet.data.loader import Examples
from dualrefnet.display.figure import (
    FAINT,
    PRIMARY,
    SECONDARY,
    ReportFigure,
    class_colours,
    class_markers,
    new_figure,
    styled,
)
from dualrefnet.display.format import interval, number
from dualrefnet.errors import RunError
from dualrefnet.evaluation.bootstrap import Difference, Estimate, group_codes, images_of
from dualrefnet.evaluation.comparison import PooledBootstrap

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Floats = NDArray[np.float64]
NEIGHBOURS = 5
# Measure -> what it is called.
MEASURES = {
    "silhouette": "silhouette (mean over images)",
    "silhouette_balanced": "silhouette (mean over classes)",
    "knn_balanced_accuracy": f"balanced accuracy of the {NEIGHBOURS} nearest neighbours",
}
LEVEL = 0.95
# MiB of distances at a time.
MEMORY = 128
# Fewer images make no map.
FEWEST = 5
# Dimensions that vary by less than this part of their size vary by rounding only.
ROUNDING = 1e-5


@dataclass(frozen=True)
class Features:
    """The fused features (N, D) of N test images, the vector that is classified; `groups` are patients or lesions
    (`unit`).
    """

    name: str
    classes: tuple[str, ...]
    image_ids: tuple[str, ...]
    labels: NDArray[np.int64]
    groups: NDArray[Any]
    values: NDArray[np.float32]
    unit: str = "patient"


@dataclass(frozen=True)
class Embedding:
    """A map of test images, and how well the classes are apart in the features that it was made from.

    `table`: image_id, class, x, y, run; a sample of the test `images` (in a comparison: of those in both).
    `separation`: `MEASURES` of the run, and of the other one in a comparison; intervals resample the `unit`, and an
    image keeps its neighbours in them. `dimensions`: of the features, without constant ones.
    """

    name: str
    classes: tuple[str, ...]
    table: pd.DataFrame
    separation: PooledBootstrap
    dimensions: int
    images: int
    seed: int
    unit: str

    def value(self, measure: str) -> Estimate:
        """Return one of `MEASURES` with its interval."""
        return self.separation.value(self.name, measure)


@dataclass(frozen=True)
class EmbeddingComparison:
    """Two runs on the same test images in the same order."""

    first: Embedding
    second: Embedding

    def difference(self, measure: str) -> Difference:
        """Return how far the first run is above the second by one of `MEASURES`."""
        return self.first.separation.difference(self.first.name, self.second.name, measure)

    def sentence(self, measure: str) -> str:
        """Say in numbers which run separates the classes better, or that there is no clear difference."""
        found = self.difference(measure)
        values = ", ".join(f"{run.name} {run.value(measure).value:.3f}" for run in (self.first, self.second))
        difference = f"{number(found.value, '+.3f')} {interval(found.low, found.high, '+.3f')}"
        result = "there is no clear difference"
        # The interval doesn't hold 0.
        if not found.low <= 0 <= found.high:
            result = f"{(self.first if found.low > 0 else self.second).name} separates the classes better"
        return f"By the {MEASURES[measure]}, {result} ({values}; difference {difference})."


def embed(
    opened: OpenedRun,
    images: int = 2000,
    samples: int = 1000,
    seed: int = 0,
    progress: Progress | None = None,
) -> Embedding:
    """Map at most `images` test images of a run, each class in proportion, and measure how well its features separate
    them.

    Raises:
        RunError: there are too few images, classes or patients; or the features are constant or not finite.
    """
    examples = opened.examples("test")
    rows = sample_rows(examples.labels, images, seed)
    features = _read(opened, opened.run.path.resolve().name, examples, rows, progress)
    return embed_features([features], len(examples), samples, seed)[0]


def compare_embeddings(
    first: OpenedRun,
    second: OpenedRun,
    names: tuple[str, str],
    images: int = 2000,
    samples: int = 1000,
    seed: int = 0,
    progress: Progress | None = None,
) -> EmbeddingComparison:
    """Map the images that two runs of different names were both tested on, and compare how well they separate the
    classes.

    RunError: see `embed`; they share no test image, or differ in labels or patients.
    """
    runs = (first, second)
    tested = [opened.examples("test") for opened in runs]
    both = shared_images(*(_frame(opened, examples) for opened, examples in zip(runs, tested, strict=True)))
    codes = np.array([first.classes.index(label) for label in both["label"]])
    chosen = both["image_id"].to_numpy()[sample_rows(codes, images, seed)]
    features = []
    for place, (opened, name, examples) in enumerate(zip(runs, names, tested, strict=True)):
        rows = pd.Index(examples.image_ids).get_indexer(pd.Index(chosen))

        def show(done: int, images: int, before: int = place * len(chosen)) -> None:
            if progress is not None:
                progress(before + done, 2 * images)

        features.append(_read(opened, name, examples, rows, show))
    return EmbeddingComparison(*embed_features(features, len(both), samples, seed))


def embed_features(runs: Sequence[Features], images: int, samples: int = 1000, seed: int = 0) -> list[Embedding]:
    """Map and measure features, a sample of `images`; several runs of other names on the same images with the same
    resamples.
    """
    labels, groups = runs[0].labels, runs[0].groups
    counts = np.unique(labels, return_counts=True)[1]
    if len(labels) < FEWEST or len(counts) < 2 or counts.max() < 2 or len(set(groups)) < 2:
        raise RunError(f"a map needs at least {FEWEST} test images, of 2 classes (one with 2 images) and 2 patients")
    spaces = {run.name: _standardise(run) for run in runs}
    separation = measure_separation(spaces, labels, groups, samples, seed)
    result = []
    for run in runs:
        place = _map(spaces[run.name], seed)
        names = [run.classes[label] for label in run.labels]
        table = pd.DataFrame(
            {"image_id": run.image_ids, "class": names, "x": place[:, 0], "y": place[:, 1], "run": run.name}
        )
        dimensions = spaces[run.name].shape[1]
        result.append(Embedding(run.name, run.classes, table, separation, dimensions, images, seed, run.unit))
    return result


def _frame(opened: OpenedRun, examples: Examples) -> pd.DataFrame:
    ids, labels = list(examples.image_ids), [opened.classes[label] for label in examples.labels]
    return pd.DataFrame({"image_id": ids, "label": labels, "group": opened.groups.loc[ids].to_numpy()})


@torch.inference_mode()
def _read(
    opened: OpenedRun, name: str, examples: Examples, rows: NDArray[np.int64], progress: Progress | None
) -> Features:
    """Run the model over rows of examples and keep the features that it classifies."""
    parts = []
    for some in in_batches(rows, opened.recipe.evaluation.batch_size, progress):
        batch = examples.batch(some)
        output = opened.model(opened.encode(batch), batch.metadata.to(opened.device))
        parts.append(output.features.float().cpu().numpy())
    chosen = _frame(opened, examples).iloc[rows]
    values, unit = np.concatenate(parts), opened.dataset.schema.unit
    ids, groups = tuple(chosen["image_id"]), chosen["group"].to_numpy()
    return Features(name, opened.classes, ids, examples.labels[rows], groups, values, unit)


def _standardise(run: Features) -> Floats:
    """Return the features with mean 0 and sd 1 in every dimension that varies."""
    values = run.values.astype(np.float64)
    if not np.isfinite(values).all():
        raise RunError(f"the features of {run.name} aren't finite: its training has failed")
    values = values[:, np.ptp(values, axis=0) > ROUNDING * np.abs(values).max(axis=0)]
    if values.shape[1] < 2:
        raise RunError(f"the features of {run.name} are the same for all images: its training has failed")
    standardised: Floats = (values - values.mean(axis=0)) / values.std(axis=0)
    return standardised


def _map(points: Floats, seed: int) -> Floats:
    """Return (N, 2) by t-SNE (van der Maaten and Hinton 2008) of at most 50 principal components of (N, D) points."""
    components = PCA(min(50, *points.shape), random_state=seed).fit_transform(points)
    model = TSNE(init="pca", perplexity=min(30, (len(points) - 1) / 3), random_state=seed)
    # Sums of several threads depend on their number, and the map on every last digit. One is also faster on a busy
    # machine.
    with threadpool_limits(limits=1):
        places: Floats = model.fit_transform(components).astype(np.float64)
    return places


def measure_separation(
    spaces: Mapping[str, Floats], labels: NDArray[np.int64], groups: ArrayLike, samples: int = 1000, seed: int = 0
) -> PooledBootstrap:
    """Measure how well the classes are apart in spaces (name -> (N, D)), each with the same resamples of patients.

    The silhouette (Rousseeuw 1987) of an image says whether it is nearer to its own class than to the nearest other
    one, from -1 to 1, by the mean Euclidean distance; that of a class's only image is 0. It and `neighbours_right` are
    computed once for every image, and the intervals resample these numbers by patient: an image keeps its neighbours.
    Return `MEASURES` of every space; a class of which no image was drawn is left out of that sample.
    """
    codes = group_codes(groups)
    patients, classes = int(codes.max()) + 1, int(labels.max()) + 1
    # How often each patient was drawn, (samples, G).
    weights = np.random.default_rng(seed).multinomial(patients, np.full(patients, 1 / patients), size=samples)

    def by_patient(values: NDArray[Any]) -> Floats:
        """Sum (N,) over each patient's images of each class, (G, C)."""
        sums = np.bincount(codes * classes + labels, values, patients * classes).reshape(patients, classes)
        return np.asarray(sums, dtype=np.float64)

    points: dict[str, dict[str, float]] = {}
    drawn: dict[str, dict[str, Floats]] = {}
    for name, space in spaces.items():
        with config_context(working_memory=MEMORY):
            values = (np.ones(len(labels)), silhouette_samples(space, labels), neighbours_right(space, labels, codes))
        sums = [by_patient(one) for one in values]
        points[name] = {measure: float(value[0]) for measure, value in _measure(sums, np.ones((1, patients))).items()}
        drawn[name] = _measure(sums, weights.astype(np.float64))
    return PooledBootstrap(points, drawn, patients, len(labels), LEVEL)


def _measure(sums: list[Floats], weights: Floats) -> dict[str, Floats]:
    """Return every measure of resamples (S, G), (S,) each, from counts, silhouettes and right neighbours, (G, C)."""
    counts, silhouettes, right = (weights @ part for part in sums)

    def over_classes(totals: Floats) -> Floats:
        # A class that wasn't drawn is left out of that sample.
        shares = np.divide(totals, counts, out=np.full(counts.shape, np.nan), where=counts > 0)
        return np.asarray(np.nanmean(shares, axis=1), dtype=np.float64)

    return {
        "silhouette": silhouettes.sum(axis=1) / counts.sum(axis=1),
        "silhouette_balanced": over_classes(silhouettes),
        "knn_balanced_accuracy": over_classes(right),
    }


def neighbours_right(points: Floats, labels: NDArray[np.int64], groups: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return (N,) whether most of an image's nearest images from other patients have its class; of a tie the nearest
    counts.
    """
    count = min(NEIGHBOURS, len(points) - 1)

    def vote(distances: Floats, start: int) -> NDArray[np.bool_]:
        rows = np.arange(len(distances))
        own = groups[start : start + len(distances)]
        distances[own[:, None] == groups] = np.inf
        nearest = np.argpartition(distances, count - 1, axis=1)[:, :count]
        away = np.take_along_axis(distances, nearest, axis=1)
        order = np.argsort(away, axis=1, kind="stable")
        # Infinite: fewer images than `count` are of other patients.
        known = np.isfinite(np.take_along_axis(away, order, axis=1))
        given = labels[np.take_along_axis(nearest, order, axis=1)]
        votes = np.zeros((len(distances), labels.max() + 1), dtype=int)
        np.add.at(votes, (rows[:, None], given), known)
        winner = known & (votes[rows[:, None], given] == votes.max(axis=1, keepdims=True))
        right: NDArray[np.bool_] = given[rows, winner.argmax(axis=1)] == labels[start : start + len(distances)]
        return right

    return np.concatenate(list(pairwise_distances_chunked(points, reduce_func=vote)))


# Letters that fit into a line: of a panel's title, of the legend.
TITLE, LEGEND = 44, 52
_KNN = "knn_balanced_accuracy"


@styled
def draw_embedding(a: Embedding, b: Embedding | None = None) -> ReportFigure:
    """Draw the map of a run's test images, or of two runs' on the same images one above the other."""
    maps = [a] if b is None else [a, b]
    shown = [name for name in a.classes if (a.table["class"] == name).any()]
    columns = max(1, min(4, 40 // max(len(name) + 4 for name in shown)))
    figure, axes = new_figure(3.1 * len(maps) + 0.2 + 0.16 * -(-len(shown) // columns), len(maps))
    for axis, run in zip(axes, maps, strict=True):
        _draw_map(axis, run)
        silhouette, neighbours = (run.value(measure).value for measure in ("silhouette", _KNN))
        numbers = f"silhouette {number(silhouette, '.2f')}, neighbours {number(neighbours, '.2f')}"
        axis.set_title(f"{textwrap.fill(run.name, TITLE)}\n{numbers}")
    handles, labels = axes[0].get_legend_handles_labels()
    handles = [handles[labels.index(name)] for name in shown]
    figure.legend(handles, shown, loc="outside lower center", ncols=columns, markerscale=1.6, handletextpad=0.1)
    few = "all" if len(a.table) == a.images else f"{len(a.table)} (each class in proportion, seed {a.seed}) of the"
    which = "test images" if b is None else "images that both runs were tested on"
    values = "; ".join(
        f"{run.name}: " + ", ".join(f"{MEASURES[name]} {_interval(run, name)}" for name in MEASURES) for run in maps
    )
    caption = (
        f"Each mark is a test image, {few} {images_of(a.images, a.separation.groups, a.unit, which)}; images near each "
        "other have similar fused features, but axes, sizes of clusters and distances between them mean nothing "
        "(t-SNE). The numbers are measured on the features themselves: the silhouette (−1 to 1), and the nearest "
        f"neighbours from other {a.unit}s (chance {1 / len(shown):.2f}). {values}. {_intervals(a)}"
    )
    alt = f"Map of {len(a.table)} test images of {len(shown)} classes. {values}."
    name = "embedding" if b is None else "embeddings"
    return ReportFigure(
        name, "t-SNE of the fused features", caption, alt, figure, pd.concat([run.table for run in maps])
    )


def _draw_map(axis: Axes, run: Embedding) -> None:
    colours, markers = class_colours(run.classes), class_markers(run.classes)
    size = 9 if len(run.table) > 600 else 14
    # Rare classes on top.
    for name in run.table["class"].value_counts().index:
        rows = run.table[run.table["class"] == name]
        look = {"color": colours[name], "marker": markers[name], "alpha": 0.8, "linewidths": 0, "label": name}
        axis.scatter(rows["x"], rows["y"], s=size, **look)
    axis.set_xticks([])
    axis.set_yticks([])
    for spine in axis.spines.values():
        spine.set(visible=True, color=FAINT)


@styled
def draw_separation(comparison: EmbeddingComparison) -> ReportFigure:
    """Draw silhouettes and nearest neighbours of two runs on the same images, with intervals."""
    runs = (first := comparison.first, comparison.second)
    figure, axes = new_figure(3.1, len(MEASURES))
    chance = 1 / first.table["class"].nunique()
    rows = []
    for axis, (measure, title) in zip(axes, MEASURES.items(), strict=True):
        axis.axvline(chance if measure == _KNN else 0, color=FAINT, linewidth=1)
        for place, (run, colour, marker) in enumerate(zip(runs, (PRIMARY, SECONDARY), ("o", "s"), strict=True)):
            found = run.value(measure)
            axis.plot([found.low, found.high], [place, place], color=colour)
            label = textwrap.fill(run.name, LEGEND)
            axis.plot([found.value], [place], marker, color=colour, markersize=5, label=label)
            row = {"run": run.name, "measure": measure, "value": found.value, "low": found.low, "high": found.high}
            rows.append(row)
        axis.set_title(title[0].upper() + title[1:])
        axis.set_ylim(1.6, -0.6)
        # The numbers stand where they can't meet a dot.
        axis.yaxis.tick_right()
        axis.set_yticks([0, 1], [_interval(run, measure) for run in runs])
        axis.tick_params(axis="y", length=0)
        axis.spines["left"].set_visible(False)
        axis.grid(visible=False, axis="y")
        axis.margins(x=0.08)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=1)
    caption = (
        "Class separation in the fused features of two runs on the same "
        f"{images_of(len(first.table), first.separation.groups, first.unit)}; further right is better. Grey line: 0 "
        f"for the silhouette, chance ({chance:.2f}) for the neighbours, which are images of other {first.unit}s. "
        f"{_intervals(first)}"
    )
    alt = " ".join(comparison.sentence(measure) for measure in MEASURES)
    return ReportFigure("separation", "Class separation", caption, alt, figure, pd.DataFrame(rows))


def _interval(run: Embedding, measure: str) -> str:
    found = run.value(measure)
    return f"{number(found.value)} {interval(found.low, found.high, '.3f')}"


def _intervals(run: Embedding) -> str:
    return f"In brackets: 95% intervals from resampling {run.unit}s, in which every image keeps its neighbours."
