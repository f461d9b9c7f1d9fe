"""The vector that is classified, made visible: where test images lie, and how well their classes are apart.

The map (t-SNE) is for looking. What is measured is measured on the vectors themselves, in all of their dimensions: a map
of two dimensions can't keep the distances of several hundred.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]  # comes with scikit-learn

from dualrefnet.data.loader import Examples
from dualrefnet.errors import RunError
from dualrefnet.evaluation.comparison import Difference, PooledBootstrap, Value
from dualrefnet.evaluation.opened_run import OpenedRun, sample_rows
from dualrefnet.explain.disagreement import shared_images
from dualrefnet.explain.separation import MEASURES, Floats, measure_separation
from dualrefnet.models.inference import encoded

# Fewer dots make no map.
FEWEST = 5
# Dimensions that vary by less than this part of their size vary by rounding only.
ROUNDING = 1e-5

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Features:
    """What a model made of N test images.

    Attributes:
        name: of the run.
        classes: C names.
        image_ids: N ids.
        labels: (N,), indices into `classes`.
        groups: (N,), the patient of every image.
        values: (N, D), the fused vector that is classified.
        unit: what the groups are: patients, or lesions (of ISIC-2019, which doesn't name its patients).
    """

    name: str
    classes: tuple[str, ...]
    image_ids: tuple[str, ...]
    labels: NDArray[np.int64]
    groups: NDArray[Any]
    values: NDArray[np.float32]
    unit: str = "patients"


@dataclass(frozen=True)
class Embedding:
    """A map of test images, and how well the classes are apart in the vectors that it was made from.

    Attributes:
        name: of the run.
        classes: in the order of the outputs.
        table: image_id, class, x, y, run; one row an image of the sample.
        separation: `MEASURES` of the run, and of the other one in a comparison; the intervals resample patients, and an image
            keeps its neighbours in them.
        dimensions: of the vector, those left out that are constant.
        images: on the test side (in a comparison: on both), of which the table is a sample.
        seed: of the sample, the map and the intervals.
        unit: what is resampled, patients or lesions.
    """

    name: str
    classes: tuple[str, ...]
    table: pd.DataFrame
    separation: PooledBootstrap
    dimensions: int
    images: int
    seed: int
    unit: str

    def value(self, measure: str) -> Value:
        """Return one of `MEASURES` with its interval."""
        return self.separation.value(self.name, measure)


@dataclass(frozen=True)
class EmbeddingComparison:
    """Two runs on the same test images.

    Attributes:
        first: a run.
        second: the other one, on the same images in the same order.
    """

    first: Embedding
    second: Embedding

    def difference(self, measure: str) -> Difference:
        """Return how far the first run is above the second by one of `MEASURES`."""
        return self.first.separation.difference(self.first.name, self.second.name, measure)

    def better(self, measure: str) -> Embedding | None:
        """Return the run that separates the classes better by one of `MEASURES`; None: the interval of the difference holds 0."""
        found = self.difference(measure)
        if found.low <= 0 <= found.high:
            return None
        return self.first if found.low > 0 else self.second

    def sentence(self, measure: str) -> str:
        """Say in numbers which run separates the classes better by one of `MEASURES`, or that it can't be told."""
        found, winner = self.difference(measure), self.better(measure)
        values = ", ".join(f"{run.name} {run.value(measure).value:.3f}" for run in (self.first, self.second))
        numbers = f"{values}; difference {found.difference:+.3f} [{found.low:+.3f}, {found.high:+.3f}]".replace("-", "−")
        said = f"{winner.name} separates the classes better" if winner else "it can't be told which run separates the classes better"
        return f"By the {MEASURES[measure]} {said} ({numbers})."

    def conclusion(self) -> str:
        """Say which run separates the classes better, by which measures, and by which it can't be told."""
        parts = []
        for run in (self.first, self.second, None):
            names = [f"the {words}" for measure, words in MEASURES.items() if self.better(measure) is run]
            if names:
                by = "all measures" if len(names) == len(MEASURES) else " and ".join(names)
                if run is None and len(names) == len(MEASURES):
                    by = "any measure"
                parts.append(f"{run.name} separates the classes better by {by}" if run else f"which is better by {by} can't be told")
        said = "; ".join(parts)
        return f"{said[0].upper()}{said[1:]}." if parts[0].startswith("which") else f"{said}."


def embed(
    opened: OpenedRun,
    images: int = 2000,
    samples: int = 1000,
    seed: int = 0,
    name: str | None = None,
    progress: Progress | None = None,
) -> Embedding:
    """Map a run's test images and measure how well its features separate their classes.

    Args:
        opened: the run.
        images: at most so many, each class in proportion.
        samples: bootstrap samples of patients.
        seed: of the sample, the map and the intervals.
        name: of the run in the table and in pictures; None: its folder's.
        progress: called with (images read, images in all).

    Raises:
        RunError: there are too few images, classes or patients; or the features are constant or not finite.
    """
    examples = opened.examples("test")
    rows = sample_rows(examples.labels, images, seed)
    features = _read(opened, name or opened.run.path.name, examples, rows, progress)
    return embed_features([features], len(examples), samples, seed)[0]


def compare_embeddings(
    first: OpenedRun,
    second: OpenedRun,
    images: int = 2000,
    samples: int = 1000,
    seed: int = 0,
    names: tuple[str, str] | None = None,
    progress: Progress | None = None,
) -> EmbeddingComparison:
    """Map the images that two runs were both tested on, and compare how well they separate the classes.

    Args:
        first: a run.
        second: another one; its labels must be the same.
        images: at most so many, each class in proportion.
        samples: bootstrap samples of patients, the same for both.
        seed: of the sample, the maps and the intervals.
        names: of the two runs in tables and pictures; None: their folders'.
        progress: called with (images read, images in all), of both runs together.

    Raises:
        RunError: see `embed`; they share no test image, or differ in labels or patients, or both are the same run.
    """
    if first.run.path.resolve() == second.run.path.resolve():
        raise RunError(f"{first.run.path} can't be compared with itself; name two runs")
    runs, names = (first, second), names or (first.run.path.name, second.run.path.name)
    if names[0] == names[1]:
        names = (str(first.run.path), str(second.run.path))
    sides = [opened.examples("test") for opened in runs]
    both = shared_images(*(_frame(opened, side) for opened, side in zip(runs, sides, strict=True)))
    codes = np.array([first.classes.index(label) for label in both["label"]])
    chosen = both["image_id"].to_numpy()[sample_rows(codes, images, seed)]
    read = []
    for number, (opened, name, side) in enumerate(zip(runs, names, sides, strict=True)):
        place = pd.Series(np.arange(len(side)), index=list(side.image_ids))
        shifted = _shifted(progress, number * len(chosen), 2 * len(chosen)) if progress else None
        read.append(_read(opened, name, side, place.loc[chosen].to_numpy(), shifted))
    return EmbeddingComparison(*embed_features(read, len(both), samples, seed))


def embed_features(runs: list[Features], images: int, samples: int = 1000, seed: int = 0) -> list[Embedding]:
    """Map and measure features; of several runs on the same images all with the same resamples of patients.

    Args:
        runs: the features, of the same images in the same order; their names differ.
        images: how many there are, of which these are a sample.
        samples: bootstrap samples of patients.
        seed: of maps and intervals.

    Raises:
        RunError: see `embed`.
    """
    _check_images(runs[0])
    spaces = {run.name: _standardise(run) for run in runs}
    separation = measure_separation(spaces, runs[0].labels, runs[0].groups, samples, seed)
    result = []
    for run in runs:
        place = _map(spaces[run.name], seed)
        names = [run.classes[label] for label in run.labels]
        table = pd.DataFrame({"image_id": run.image_ids, "class": names, "x": place[:, 0], "y": place[:, 1], "run": run.name})
        result.append(Embedding(run.name, run.classes, table, separation, spaces[run.name].shape[1], images, seed, run.unit))
    return result


def _frame(opened: OpenedRun, examples: Examples) -> pd.DataFrame:
    labels = [opened.classes[label] for label in examples.labels]
    return pd.DataFrame({
        "image_id": examples.image_ids, "label": labels, "group": opened.groups.loc[list(examples.image_ids)].to_numpy()
    })  # fmt: skip


def _shifted(progress: Progress, before: int, total: int) -> Progress:
    return lambda done, _: progress(before + done, total)


@torch.inference_mode()
def _read(opened: OpenedRun, name: str, examples: Examples, rows: NDArray[np.int64], progress: Progress | None) -> Features:
    """Run the model over rows of examples and keep the vectors that it classifies."""
    parts, size = [], opened.recipe.evaluation.batch_size
    for start in range(0, len(rows), size):
        batch = examples.batch(rows[start : start + size])
        images = encoded(batch.features, opened.device) if batch.features else opened.images(batch)
        parts.append(opened.model(images, batch.metadata.to(opened.device)).features.float().cpu().numpy())
        if progress:
            progress(min(start + size, len(rows)), len(rows))
    chosen = _frame(opened, examples).iloc[rows]
    groups, unit = chosen["group"].to_numpy(), "lesions" if opened.recipe.data.dataset == "isic_2019" else "patients"
    return Features(name, opened.classes, tuple(chosen["image_id"]), examples.labels[rows], groups, np.concatenate(parts), unit)


def _check_images(run: Features) -> None:
    counts = np.unique(run.labels, return_counts=True)[1]
    if len(run.labels) < FEWEST or len(counts) < 2 or counts.max() < 2 or len(set(run.groups)) < 2:
        raise RunError(f"a map needs at least {FEWEST} test images, of 2 classes (one with 2 images) and 2 patients")


def _standardise(run: Features) -> Floats:
    """Return the features with mean 0 and sd 1 in every dimension that varies."""
    values = run.values.astype(np.float64)
    if not np.isfinite(values).all():
        raise RunError(f"the features of {run.name} aren't finite: its training has failed")
    values = values[:, np.ptp(values, axis=0) > ROUNDING * np.abs(values).max(axis=0)]
    if values.shape[1] < 2:
        raise RunError(f"the features of {run.name} are the same for all images: its training has failed, and there is nothing to map")
    standardised: Floats = (values - values.mean(axis=0)) / values.std(axis=0)
    return standardised


def _map(points: Floats, seed: int) -> Floats:
    """Return a place in the plane for each of (N, D) points: t-SNE (van der Maaten and Hinton 2008) of at most 50 components."""
    components = PCA(min(50, *points.shape), random_state=seed).fit_transform(points)
    model = TSNE(init="pca", perplexity=min(30, (len(points) - 1) / 3), random_state=seed)
    # Sums of several threads depend on their number, and the map on every last digit. One is also faster on a busy machine.
    with threadpool_limits(limits=1):
        places: Floats = model.fit_transform(components).astype(np.float64)
    return places
