"""Modality dropout: training cases lose fields, forms and photographs at random, so that the model copes with what is missing later.

Neverova et al. 2016 drop whole modalities; fields are dropped by a share that is itself drawn, so that every amount is met as often.
With `pattern` a case takes over what is missing in another one: then what is missing says less about the class.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dualrefnet.recipe import ModalityDropoutSection
from dualrefnet.runtime.imputer import Span


@dataclass(frozen=True)
class Gaps:
    """What is taken away from N cases.

    Attributes:
        columns: (N, M) of the encoded form.
        image: (N,) whole photographs.
    """

    columns: NDArray[np.bool_]
    image: NDArray[np.bool_]


def draw_gaps(metadata: NDArray[np.float32], spans: list[Span], section: ModalityDropoutSection, seed: int, epoch: int) -> Gaps:
    """Draw what every training case loses in one epoch.

    Args:
        metadata: (N, M) encoded forms, NaN where a field is missing.
        spans: the columns of each field.
        section: the probabilities.
        seed: of the run.
        epoch: from 0.
    """
    count, fields = len(metadata), len(spans)
    # Each choice has its own stream, so changing one setting leaves the other choices as they were.
    streams = [np.random.default_rng([seed, epoch, 100 + number]) for number in range(6)]
    known = np.zeros((count, fields), dtype=bool)
    for index, span in enumerate(spans):
        # A category of which the training rows had no value has no column, and can't be known.
        known[:, index] = (span.stop > span.start) & ~np.isnan(metadata[:, span.start : span.stop]).any(axis=1)
    share = streams[0].random(count) * (streams[1].random(count) < section.fields)
    hidden = streams[2].random((count, fields)) < share[:, None]
    others = streams[3].permutation(count)
    hidden |= ~known[others] & (streams[3].random(count) < section.pattern)[:, None]
    hidden |= (streams[4].random(count) < section.form)[:, None]
    # A case that shows nothing at all teaches nothing.
    image = (streams[5].random(count) < section.image) & (known & ~hidden).any(axis=1)
    columns = np.zeros(metadata.shape, dtype=bool)
    for index, span in enumerate(spans):
        columns[:, span.start : span.stop] = hidden[:, index, None]
    return Gaps(columns, image)
