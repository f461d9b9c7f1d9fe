"""How well classes are apart in the fused features and in the hidden activations that they become: a t-SNE map,
silhouette, compactness and nearest neighbours, with intervals over patients.
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
from dualrefnet.analysis.opened_run import OpenedRun, in_batches, sample_rows
from dualrefnet.data.loader import Examples
from dualrefnet.display.figure import (
    FAINT,
    PAPER,
    PRIMARY,
    SECONDARY,
    ReportFigure,
    class_colours,
    class_markers,
    new_figure,
    styled,
)
from dualrefnet.display.format import Cell, PrintedTable, interval, number
from dualrefnet.errors import RunError
from dualrefnet.evaluation.bootstrap import Difference, Estimate, group_codes, images_of
from dualrefnet.evaluation.comparison import PooledBootstrap

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Floats = NDArray[np.float64]
NEIGHBOURS = 5
# Where the classes are looked at -> what it is called: before and after the first of the two layers that R penalises.
VECTORS = {"fused": "fused features", "hidden": "hidden activations"}
# Measure -> what it is called.
MEASURES = {
    "silhouette": "silhouette (mean over images)",
    "silhouette_balanced": "silhouette (mean over classes)",
    "within_class_variance": "variance within classes (less is better)",
    "knn_balanced_accuracy": f"balanced accuracy of the {NEIGHBOURS} nearest neighbours",
}
# The smaller it is, the more compact are the classes.
LESS_IS_BETTER = ("within_class_variance",)
LEVEL = 0.95
# MiB of distances at a time.
MEMORY = 128
# Fewer images make no map.
FEWEST = 5
# Dimensions that vary by less than this part of their size vary by rounding only.
ROUNDING = 1e-5


@dataclass(frozen=True)
class Features:
    """The fused features (N, D) and hidden activations (N, H) of N test images; equal where no layer is between."""

    name: str
    classes: tuple[str, ...]
    image_ids: tuple[str, ...]
    labels: NDArray[np.int64]
    groups: NDArray[Any]
    fused: NDArray[np.float32]
    hidden: NDArray[np.float32]
    unit: str = "patient"

    def vectors(self) -> dict[str, NDArray[np.float32]]:
        return {"fused": self.fused, "hidden": self.hidden}


@dataclass(frozen=True)
class Embedding:
    """A map of test images, and how well the classes are apart in the vectors that it was made from.

    In a comparison `separation` holds both runs; intervals resample the `unit`, and an image keeps its neighbours in
    them.
    """

    name: str
    classes: tuple[str, ...]
    table: pd.DataFrame
    separation: PooledBootstrap
    dimensions: dict[str, int]
    images: int
    seed: int
    unit: str

    @property
    def vectors(self) -> list[str]:
        return list(self.dimensions)

    @property
    def test_images(self) -> int:
        return len(self.table) // len(self.dimensions)

    def value(self, measure: str, vector: str) -> Estimate:
        """Return one of `MEASURES` of a vector with its interval."""
        return self.separation.value(_space(self.name, vector), measure)


@dataclass(frozen=True)
class EmbeddingComparison:
    """Two runs on the same test images in the same order."""

    first: Embedding
    second: Embedding

    def difference(self, measure: str, vector: str) -> Difference:
        """Return how far the first run is above the second by one of `MEASURES`."""
        first, second = (_space(run.name, vector) for run in (self.first, self.second))
        return self.first.separation.difference(first, second, measure)

    def better(self, measure: str, vector: str) -> str:
        """Return the name of the run that separates the classes better; empty: the interval holds 0."""
        found = self.difference(measure, vector)
        if found.low <= 0 <= found.high:
            return ""
        return (self.first if (found.low > 0) != (measure in LESS_IS_BETTER) else self.second).name


def embed(opened: OpenedRun, images: int = 2000, samples: int = 1000, seed: int = 0) -> Embedding:
    """Map at most `images` test images of a run, each class in proportion, and measure how well it separates them."""
    examples = opened.examples("test")
    rows = sample_rows(examples.labels, images, seed)
    if examples.folds is not None:
        # Features of different members lie in different spaces: those of one, on the fold that it hasn't seen.
        rows = np.flatnonzero(examples.folds == 0)
        rows = rows[sample_rows(examples.labels[rows], images, seed)]
    features = _read(opened, opened.run.path.resolve().name, examples, rows)
    return embed_features([features], len(examples), samples, seed)[0]


def compare_embeddings(
    first: OpenedRun, second: OpenedRun, names: tuple[str, str], images: int = 2000, samples: int = 1000, seed: int = 0
) -> EmbeddingComparison:
    """Map the images that two runs were both tested on, and compare how well they separate the classes."""
    runs = (first, second)
    tested = [opened.examples("test") for opened in runs]
    frames = [_frame(opened, examples) for opened, examples in zip(runs, tested, strict=True)]
    # Of a cross-fitted run the first fold; see `embed`.
    both = shared_images(
        *(
            frame if examples.folds is None else frame[examples.folds == 0]
            for frame, examples in zip(frames, tested, strict=True)
        )
    )
    codes = np.array([first.classes.index(label) for label in both["label"]])
    chosen = both["image_id"].to_numpy()[sample_rows(codes, images, seed)]
    features = []
    for opened, name, examples in zip(runs, names, tested, strict=True):
        rows = pd.Index(examples.image_ids).get_indexer(pd.Index(chosen))
        features.append(_read(opened, name, examples, rows))
    return EmbeddingComparison(*embed_features(features, len(both), samples, seed))


def embed_features(runs: Sequence[Features], images: int, samples: int = 1000, seed: int = 0) -> list[Embedding]:
    """Map and measure the vectors of a sample of `images`; several runs on the same images and resamples."""
    labels, groups = runs[0].labels, runs[0].groups
    counts = np.unique(labels, return_counts=True)[1]
    if len(labels) < FEWEST or len(counts) < 2 or counts.max() < 2 or len(set(groups)) < 2:
        raise RunError(f"a map needs at least {FEWEST} test images, of 2 classes (one with 2 images) and 2 patients")
    hidden = any(not np.array_equal(run.fused, run.hidden) for run in runs)
    vectors = list(VECTORS) if hidden else ["fused"]
    spaces = {_space(run.name, vector): _standardise(run, vector) for run in runs for vector in vectors}
    separation = measure_separation(spaces, labels, groups, samples, seed)
    result = []
    for run in runs:
        own = {vector: spaces[_space(run.name, vector)] for vector in vectors}
        columns = {"image_id": run.image_ids, "class": [run.classes[label] for label in run.labels]}
        tables = []
        for vector, space in own.items():
            place = _map(space, seed)
            tables.append(pd.DataFrame({**columns, "vector": vector, "x": place[:, 0], "y": place[:, 1]}))
        table = pd.concat(tables, ignore_index=True).assign(run=run.name)
        dimensions = {vector: space.shape[1] for vector, space in own.items()}
        result.append(Embedding(run.name, run.classes, table, separation, dimensions, images, seed, run.unit))
    return result


def _space(run: str, vector: str) -> str:
    return f"{run}, {VECTORS[vector]}"


def _frame(opened: OpenedRun, examples: Examples) -> pd.DataFrame:
    ids, labels = list(examples.image_ids), [opened.classes[label] for label in examples.labels]
    return pd.DataFrame({"image_id": ids, "label": labels, "group": opened.groups.loc[ids].to_numpy()})


@torch.inference_mode()
def _read(opened: OpenedRun, name: str, examples: Examples, rows: NDArray[np.int64]) -> Features:
    """Run the model over rows of examples and keep what it classifies."""
    fused, hidden = [], []
    for some in in_batches(rows, opened.recipe.evaluation.batch_size, f"features of {name}"):
        metadata = torch.from_numpy(examples.metadata[some]).to(opened.device)
        output = opened.model(opened.encode_rows(examples, some), metadata)
        fused.append(output.features.float().cpu().numpy())
        hidden.append(output.hidden.float().cpu().numpy())
    chosen = _frame(opened, examples).iloc[rows]
    ids, groups, labels = tuple(chosen["image_id"]), chosen["group"].to_numpy(), examples.labels[rows]
    values = (np.concatenate(fused), np.concatenate(hidden))
    return Features(name, opened.classes, ids, labels, groups, *values, opened.dataset.schema.unit)


def _standardise(run: Features, vector: str) -> Floats:
    """Return a vector of all images with mean 0 and sd 1 in every dimension that varies."""
    values, name = run.vectors()[vector].astype(np.float64), VECTORS[vector]
    if not np.isfinite(values).all():
        raise RunError(f"the {name} of {run.name} aren't finite: its training has failed")
    values = values[:, np.ptp(values, axis=0) > ROUNDING * np.abs(values).max(axis=0)]
    if values.shape[1] < 2:
        raise RunError(f"the {name} of {run.name} are the same for all images: its training has failed")
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

    The silhouette (Rousseeuw 1987) lies in -1..1, 0 for a class's only image. The variance within classes is a share of
    that about the mean of all. Both and `neighbours_right` are computed once an image, and intervals resample these
    numbers.
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
            values = (
                np.ones(len(labels)),
                silhouette_samples(space, labels),
                _squared_distances(space, labels),
                neighbours_right(space, labels, codes),
            )
        sums = [by_patient(one) for one in values]
        points[name] = {measure: float(value[0]) for measure, value in _measure(sums, np.ones((1, patients))).items()}
        drawn[name] = _measure(sums, weights.astype(np.float64))
    return PooledBootstrap(points, drawn, patients, len(labels), LEVEL)


def _squared_distances(space: Floats, labels: NDArray[np.int64]) -> Floats:
    """Return (N,): squared distance to the mean of the own class, over the mean of those to the mean of all."""
    centres = np.stack(
        [
            space[labels == label].mean(axis=0) if (labels == label).any() else np.zeros(space.shape[1])
            for label in range(labels.max() + 1)
        ]
    )
    within = ((space - centres[labels]) ** 2).sum(axis=1)
    total: float = ((space - space.mean(axis=0)) ** 2).sum(axis=1).mean()
    return np.asarray(within / total, dtype=np.float64)


def _measure(sums: list[Floats], weights: Floats) -> dict[str, Floats]:
    """Return every measure of resamples (S, G), from counts, silhouettes, distances, right neighbours, (G, C)."""
    counts, silhouettes, distances, right = (weights @ part for part in sums)

    def over_classes(totals: Floats) -> Floats:
        # A class that wasn't drawn is left out of that sample.
        shares = np.divide(totals, counts, out=np.full(counts.shape, np.nan), where=counts > 0)
        return np.asarray(np.nanmean(shares, axis=1), dtype=np.float64)

    return {
        "silhouette": silhouettes.sum(axis=1) / counts.sum(axis=1),
        "silhouette_balanced": over_classes(silhouettes),
        "within_class_variance": over_classes(distances),
        "knn_balanced_accuracy": over_classes(right),
    }


def neighbours_right(points: Floats, labels: NDArray[np.int64], groups: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return (N,) whether most of the nearest images of other patients have the image's class; ties: the nearest."""
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
TITLE, LEGEND = 30, 52
_KNN = "knn_balanced_accuracy"


@styled
def draw_embedding(a: Embedding, b: Embedding | None = None) -> ReportFigure:
    """Draw the maps of a run's test images, or of two runs' one above the other, a column for each vector."""
    maps = [a] if b is None else [a, b]
    vectors = a.vectors
    shown = [name for name in a.classes if (a.table["class"] == name).any()]
    columns = max(1, min(4, 40 // max(len(name) + 4 for name in shown)))
    tall = 2.2 if len(vectors) > 1 else 3.1
    height = tall * len(maps) + 0.2 + 0.16 * -(-len(shown) // columns)
    figure, axes = new_figure(height, len(maps), len(vectors))
    for axis, (run, vector) in zip(axes, [(run, vector) for run in maps for vector in vectors], strict=True):
        _draw_map(axis, run, run.table[run.table["vector"] == vector])
        silhouette, neighbours = (number(run.value(measure, vector).value, ".2f") for measure in ("silhouette", _KNN))
        title = textwrap.fill(run.name, TITLE) + f"\n{VECTORS[vector]}" * (len(vectors) > 1)
        axis.set_title(f"{title}\nsilhouette {silhouette}, neighbours {neighbours}", fontsize=7)
    handles, labels = axes[0].get_legend_handles_labels()
    handles = [handles[labels.index(name)] for name in shown]
    figure.legend(handles, shown, loc="outside lower center", ncols=columns, markerscale=1.6, handletextpad=0.1)
    sampled = a.test_images < a.images
    few = f"{a.test_images} (each class in proportion, seed {a.seed}) of the" if sampled else "all"
    which = "test images" if b is None else "images that both runs were tested on"
    values = "; ".join(
        f"{run.name}, {VECTORS[vector]}: "
        + ", ".join(f"{MEASURES[name]} {_interval(run, name, vector)}" for name in MEASURES)
        for run in maps
        for vector in vectors
    )
    caption = (
        f"Each mark is a test image, {few} {images_of(a.images, a.separation.groups, a.unit, which)}; images near each "
        "other have similar features, but axes, sizes of clusters and distances between them mean nothing "
        "(t-SNE). The numbers are measured on the vectors themselves: the silhouette (−1 to 1), the variance within "
        f"classes (less is more compact) and the nearest neighbours from other {a.unit}s (chance "
        f"{1 / len(shown):.2f})."
    )
    if b is None:
        caption += f" {values}. {_intervals(a)}"
    if len(vectors) == 1:
        caption += " The network has no hidden layer between the fused features and the scores."
    alt = f"Maps of {a.test_images} test images of {len(shown)} classes. {values}."
    name, title = "embedding" if b is None else "embeddings", " and ".join(VECTORS[vector] for vector in vectors)
    return ReportFigure(name, f"t-SNE of the {title}", caption, alt, figure, pd.concat([run.table for run in maps]))


def _draw_map(axis: Axes, run: Embedding, table: pd.DataFrame) -> None:
    colours, markers = class_colours(run.classes), class_markers(run.classes)
    size = 5 if len(table) > 600 else 9
    # Rare classes on top.
    for name in table["class"].value_counts().index:
        rows = table[table["class"] == name]
        look = {"color": colours[name], "marker": markers[name], "alpha": 0.8, "linewidths": 0, "label": name}
        axis.scatter(rows["x"], rows["y"], s=size, **look)
    axis.set_xticks([])
    axis.set_yticks([])
    for spine in axis.spines.values():
        spine.set(visible=True, color=FAINT)


@styled
def draw_separation(comparison: EmbeddingComparison) -> ReportFigure:
    """Draw the measures of two runs on the same images, with intervals, for each vector."""
    runs = (first := comparison.first, comparison.second)
    places = [(run, vector) for vector in first.vectors for run in runs]
    figure, axes = new_figure(0.4 + len(MEASURES) * (0.4 + 0.17 * len(places)), len(MEASURES))
    chance = 1 / first.table["class"].nunique()
    rows: list[dict[str, Any]] = []
    for axis, (measure, title) in zip(axes, MEASURES.items(), strict=True):
        if measure not in LESS_IS_BETTER:
            axis.axvline(chance if measure == _KNN else 0, color=FAINT, linewidth=1)
        for place, (run, vector) in enumerate(places):
            found = run.value(measure, vector)
            colour, marker = (PRIMARY, "o") if run is first else (SECONDARY, "s")
            axis.plot([found.low, found.high], [place, place], color=colour)
            label = textwrap.fill(f"{run.name}, {VECTORS[vector]}", LEGEND)
            face = PAPER if vector == "fused" and len(first.vectors) > 1 else colour
            axis.plot([found.value], [place], marker, color=colour, markersize=5, markerfacecolor=face, label=label)
            row = {"run": run.name, "vector": vector, "measure": measure}
            rows.append({**row, "value": found.value, "low": found.low, "high": found.high})
        axis.set_title(title[0].upper() + title[1:])
        axis.set_ylim(len(places) - 0.4, -0.6)
        # The numbers stand where they can't meet a dot.
        axis.yaxis.tick_right()
        axis.set_yticks(range(len(places)), [_interval(run, measure, vector) for run, vector in places])
        axis.tick_params(axis="y", length=0)
        axis.spines["left"].set_visible(False)
        axis.grid(visible=False, axis="y")
        axis.margins(x=0.08)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=1)
    caption = (
        "Class separation of two runs on the same "
        f"{images_of(first.test_images, first.separation.groups, first.unit)}; further right is better, but for the "
        "variance, a share of that of all images. Grey line: 0 "
        f"for the silhouette, chance ({chance:.2f}) for the neighbours, which are images of other {first.unit}s. "
        f"{_intervals(first)}"
    )
    each = (f"{row['run']}, {VECTORS[row['vector']]}: {MEASURES[row['measure']]} {row['value']:.3f}" for row in rows)
    return ReportFigure("separation", "Class separation", caption, "; ".join(each), figure, pd.DataFrame(rows))


def separation_table(comparison: EmbeddingComparison) -> PrintedTable:
    runs = (comparison.first, comparison.second)
    rows = []
    for vector in runs[0].vectors:
        for measure, name in MEASURES.items():
            found = comparison.difference(measure, vector)
            found_each = [run.value(measure, vector) for run in runs]
            line = [Cell(VECTORS[vector]), Cell(name)]
            line += [Cell.estimate(one.value, one.low, one.high, bounds=".3f") for one in found_each]
            difference = Cell(number(found.value, "+.3f"), interval(found.low, found.high, ".3f"))
            better = comparison.better(measure, vector) or "no clear difference"
            rows.append([*line, difference, Cell(number(found.p)), Cell(better)])
    columns = ("vector", "measure", *(run.name for run in runs), "difference", "p", "better")
    note = f"{_intervals(runs[0])} Of the variance within classes less is better: more compact classes."
    return PrintedTable("Class separation", columns, rows, (note,), left=2)


def _interval(run: Embedding, measure: str, vector: str) -> str:
    found = run.value(measure, vector)
    return f"{number(found.value)} {interval(found.low, found.high, '.3f')}"


def _intervals(run: Embedding) -> str:
    return f"In brackets: 95% intervals from resampling {run.unit}s, in which every image keeps its neighbours."
