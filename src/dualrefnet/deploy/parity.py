"""Do two networks give the same answers, are they as often right, and which of them is faster?"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from dualrefnet.data.loader import Examples
from dualrefnet.data.metadata import MetadataEncoder
from dualrefnet.data.sample_drawing import STYLES, draw_lesion, photograph
from dualrefnet.data.schema import BOOLEAN_VALUES
from dualrefnet.evaluation.metrics import compute_metrics
from dualrefnet.evaluation.opened_run import sample_rows
from dualrefnet.runtime.classifier import Answered, Network
from dualrefnet.runtime.preprocessing import ImageSettings, preprocess
from dualrefnet.runtime.probabilities import softmax

BATCH = 16
# Of the race: calls are timed in turn, so that what else the machine does hits both alike.
ROUNDS = 15

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Cases:
    """Inputs of networks, as many as a machine holds at once.

    Attributes:
        images: (N, S, S, 3) uint8, preprocessed; None for models that read none.
        forms: (N, M) float32, encoded.
        labels: (N,) class indices; None for drawn pictures.
    """

    images: NDArray[np.uint8] | None
    forms: NDArray[np.float32]
    labels: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.forms)

    def part(self, start: int, stop: int) -> Cases:
        """Return some of the cases, without labels."""
        return Cases(None if self.images is None else self.images[start:stop], self.forms[start:stop])


@dataclass(frozen=True)
class Agreement:
    """How far the probabilities of two networks are from each other.

    Attributes:
        cases: that both were asked about.
        largest: difference of the probability of a class of a case.
        mean: of all these differences.
        same: share of the cases to which both give the same class.
    """

    cases: int
    largest: float
    mean: float
    same: float

    def to_json(self) -> dict[str, Any]:
        """Return it as plain JSON values."""
        return {
            "cases": self.cases,
            "max_probability_difference": self.largest,
            "mean_probability_difference": self.mean,
            "same_label": self.same,
        }


@dataclass(frozen=True)
class Race:
    """How long two networks took.

    Attributes:
        batch: cases at once.
        first: milliseconds a call, median.
        second: the same of the other.
        times_as_fast: the second is so many times as fast as the first; median over rounds.
    """

    batch: int
    first: float
    second: float
    times_as_fast: float


def real_cases(examples: Examples, size: int, at_most: int, seed: int = 0) -> Cases:
    """Take cases of one side of a split, each class in proportion.

    Args:
        examples: with their pictures (`OpenedRun.pictures`).
        size: side of the model's input, pixels.
        at_most: how many.
        seed: of the choice.
    """
    rows = sample_rows(examples.labels, at_most, seed)
    images = None
    if examples.store is not None and examples.store_rows is not None:
        images = examples.store.read(examples.store_rows[rows])
        if images.shape[1] == 2 * size:
            # Kept for native super-resolution targets; the mean of 2 x 2 pixels, as `to_unit` takes it, but in whole numbers.
            images = np.rint(images.reshape(len(images), size, 2, size, 2, 3).mean(axis=(2, 4))).astype(np.uint8)
    return Cases(images, examples.metadata[rows], examples.labels[rows])


def drawn_cases(count: int, image: ImageSettings | None, metadata: MetadataEncoder, seed: int = 0) -> Cases:
    """Make cases up: pictures drawn by a program, and forms with random answers and gaps. Nothing can be measured on them but agreement.

    Args:
        count: how many.
        image: what is done to a photograph; None for models that read none.
        metadata: the fitted encoder.
        seed: of all that is random.
    """
    random = np.random.default_rng(seed)
    images = None
    if image is not None:
        drawn = []
        for number in range(count):
            lesion = draw_lesion(list(STYLES)[number % len(STYLES)], random)
            picture = photograph(lesion, int(random.integers(1, 7)), float(random.uniform(0.15, 0.35)), 3.0, random, max(64, image.size))
            drawn.append(preprocess(picture, image))
        images = np.stack(drawn)
    answers = {}
    for one, levels, centre, spread in zip(metadata.fields, metadata.levels, metadata.centre, metadata.spread, strict=True):
        given = random.normal(centre, spread, count) if one.kind == "numeric" else random.choice(list(levels or BOOLEAN_VALUES), count)
        answers[one.name] = pd.Series(given, dtype=object).mask(random.random(count) < 0.25)
    # A model of the photograph alone still has rows.
    return Cases(images, metadata.encode(pd.DataFrame(answers, index=range(count))).values)


def ask(network: Network, cases: Cases, absent: NDArray[np.bool_] | None = None, progress: Progress | None = None) -> Answered:
    """Ask a network about all cases.

    Args:
        network: see `dualrefnet.runtime.classifier.Network`.
        cases: to ask about.
        absent: (N,) photographs that are taken away, for models with learned tokens.
        progress: called with (cases done, cases in all).
    """
    logits, vectors = [], []
    for start in range(0, len(cases), BATCH):
        part = cases.part(start, start + BATCH)
        gone = np.zeros(len(part), dtype=bool) if absent is None else absent[start : start + BATCH]
        answered = network(part.images, gone, part.forms)
        logits.append(answered.logits)
        vectors.append(answered.vectors)
        if progress is not None:
            progress(start + len(part), len(cases))
    there = [one for one in vectors if one is not None]
    return Answered(np.concatenate(logits), np.concatenate(there) if there else None)


def agreement(first: NDArray[np.floating], second: NDArray[np.floating]) -> Agreement:
    """Compare the logits (N, C) of two networks.

    Raises:
        ValueError: the shapes differ, or there is no case.
    """
    if first.shape != second.shape or not len(first):
        raise ValueError(f"logits of the shapes {first.shape} and {second.shape} can't be compared")
    ours, theirs = softmax(first), softmax(second)
    difference = np.abs(ours - theirs)
    # A network that gives NaN agrees with nobody.
    largest, mean = (float(value) if np.isfinite(value) else float("inf") for value in (difference.max(), difference.mean()))
    return Agreement(len(first), largest, mean, float((ours.argmax(axis=1) == theirs.argmax(axis=1)).mean()))


def check_parity(first: Network, second: Network, cases: Cases, learned_tokens: bool, progress: Progress | None = None) -> Agreement:
    """Compare two networks that shall be the same; of a model with learned tokens also where photographs are missing.

    Args:
        first: a network.
        second: another.
        cases: to ask about.
        learned_tokens: whether they answer without a photograph.
        progress: called with (answers got, in all).
    """
    count = len(cases)
    rounds: list[NDArray[np.bool_] | None] = [None]
    if learned_tokens and cases.images is not None:
        # Beside each other in one batch: one's gap must not touch the other.
        rounds.append(np.arange(count) % 2 == 0)
    logits: tuple[list[NDArray[np.floating]], ...] = ([], [])
    total = count * len(rounds) * 2
    for number, absent in enumerate(rounds):
        for side, network in enumerate((first, second)):
            done = (2 * number + side) * count
            show = partial(_further, progress, done, total) if progress is not None else None
            logits[side].append(ask(network, cases, absent, show).logits)
    return agreement(np.concatenate(logits[0]), np.concatenate(logits[1]))


def accuracy(logits: NDArray[np.floating], cases: Cases, classes: tuple[str, ...]) -> dict[str, float]:
    """Return accuracy and balanced accuracy of answers to real cases.

    Raises:
        ValueError: the cases have no labels.
    """
    if cases.labels is None:
        raise ValueError("drawn pictures have no labels: nothing can be right or wrong")
    measured = compute_metrics(cases.labels, softmax(logits), list(classes))
    return {name: float(measured[name]) for name in ("accuracy", "balanced_accuracy")}


def race(first: Network, second: Network, cases: Cases, batch: int = 1, rounds: int = ROUNDS) -> Race:
    """Time two networks on the same cases, one call of each in turn.

    Args:
        first: a network.
        second: another.
        cases: of which the first `batch` are asked about.
        batch: at once.
        rounds: of which the medians are taken.
    """
    part = cases.part(0, batch)
    gone = np.zeros(len(part), dtype=bool)
    times = np.zeros((rounds + 2, 2))
    for number in range(len(times)):
        for side, network in enumerate((first, second)):
            start = time.perf_counter()
            network(part.images, gone, part.forms)
            times[number, side] = time.perf_counter() - start
    # The first two calls set memory up.
    times = times[2:]
    median = 1000 * np.median(times, axis=0)
    return Race(len(part), float(median[0]), float(median[1]), float(np.median(times[:, 0] / times[:, 1])))


def _further(progress: Progress, before: int, total: int, done: int, _: int) -> None:
    progress(before + done, total)
