"""Do results hold for everyone? Every level of a field (women, men) against all other images for which the field is recorded.

Images for which it isn't are a level of their own, compared with all for which it is. They aren't among "the others" of a recorded
level: where a field is missing for a reason (in PAD-UFES-20 never for a cancer), a gap between women and all others would be one
between recorded and not recorded.

A gap says that results differ, not why: cases may be harder, photographs worse, or the training images fewer. To compare like with
like, measures of classes run over the classes that both sides have from enough patients; otherwise a level without melanomas would
look good. A small level may have any value by chance, so levels with few images or patients have no numbers at all.

The expected calibration error grows as images get fewer, so that every small level would look worse than the others, and every
resample worse than the level. It is listed, but interval and gap are those of the *overconfidence*, mean confidence less accuracy,
which has no such bias.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd

from dualrefnet.data.schema import DatasetSchema
from dualrefnet.errors import DataError
from dualrefnet.evaluation.compared_sides import Side, Whole, compare
from dualrefnet.evaluation.intervals import draw, group_codes
from dualrefnet.evaluation.levels import NOT_RECORDED, field_levels
from dualrefnet.evaluation.opened_run import OpenedRun
from dualrefnet.progress import progress_bar


@dataclass(frozen=True)
class Subgroups:
    """Results by level.

    Attributes:
        levels: one row a level: `field`, `level`, `images`, `patients`, `malignant` (images; NaN if no class is), `measured`
            (whether it has numbers), `missing` (classes of the test side that it lacks, separated by commas). Categories that the
            schema names and no image has are there with 0 images.
        table: one row a measured level and measure: `field`, `level`, `measure`, `value`, `low`, `high`, `others` (the value of all
            the images that it is compared with), `gap` (value - others), `gap_low`, `gap_high`, `flagged` (0 lies outside the gap's
            interval), `counted` (False: a comparison of the same images stands above, such as women with men for men with women),
            `classes` (over which the measure runs).
            NaN: undefined, too few patients, or no interval.
        overall: measure -> value of the whole test side.
        descriptions: field -> its question in plain words.
        images: number in the test side.
        groups: number of patients.
        samples: bootstrap samples.
        seed: of the draw.
        level: coverage of the intervals.
    """

    levels: pd.DataFrame
    table: pd.DataFrame
    overall: dict[str, float]
    descriptions: dict[str, str]
    images: int
    groups: int
    samples: int
    seed: int
    level: float

    @property
    def looked_at(self) -> int:
        """Number of gaps with an interval."""
        return int((self.table["counted"] & self.table["gap_low"].notna()).sum())

    @property
    def flagged(self) -> int:
        """Number of them whose interval doesn't hold 0."""
        return int((self.table["counted"] & self.table["flagged"]).sum())

    @property
    def by_chance(self) -> float:
        """How many would be flagged, on average, if results were the same for all."""
        return (1 - self.level) * self.looked_at

    def frame(self) -> pd.DataFrame:
        """Return everything as one tidy table: one row a level and measure, one row for a level without numbers."""
        return self.levels.merge(self.table, on=["field", "level"], how="left", sort=False)


def measure_subgroups(
    predictions: pd.DataFrame,
    rows: pd.DataFrame,
    groups: pd.Series,
    schema: DatasetSchema,
    samples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
    progress: Callable[[int, int], None] | None = None,
) -> Subgroups:
    """Measure every level of every field with `subgroup`, and how far it is from the others.

    Args:
        predictions: rows of `predictions.csv`, of the test side: `image_id`, `label` and `prob_<CLASS>`.
        rows: the lesion table's rows; those of other images don't matter.
        groups: image id -> patient (of ISIC-2019: lesion).
        schema: of the lesion table.
        samples: bootstrap samples.
        seed: of the draw.
        level: coverage of the intervals.
        progress: called with (samples done, samples in all).

    Raises:
        DataError: no field is marked with `subgroup`, or rows or groups of images are missing.
        ValueError: see `check_predictions` and `group_codes`.
    """
    fields = [field for field in schema.fields if field.subgroup]
    if not fields:
        raise DataError(f"no metadata field of {schema.title} is marked with `subgroup: true`: there is nothing to compare")
    ids = predictions["image_id"]
    absent = set(ids) - (set(rows["image_id"]) & set(groups.index))
    if absent:
        raise DataError(f"{len(absent)} predicted images aren't in the lesion table or the split; are these the data of the run?")
    rows = rows.set_index("image_id").loc[ids]
    test = Whole.of(predictions, group_codes(groups.loc[ids].to_numpy()), schema)

    level_rows, sides, counted = [], [], []
    seen: set[frozenset[bytes]] = set()
    for field in fields:
        values, order = field_levels(rows[field.name], field)
        recorded = (values != NOT_RECORDED).to_numpy()
        for name in order:
            mine = (values == name).to_numpy()
            theirs = ~mine & recorded
            level_rows.append({"field": field.name, "level": name, **test.support(mine)})
            sides.append((mine, theirs))
            pair = frozenset([mine.tobytes(), theirs.tobytes()])
            counted.append(pair not in seen)
            if level_rows[-1]["measured"]:
                seen.add(pair)
    levels = pd.DataFrame(level_rows)
    chosen = np.flatnonzero(levels["measured"])
    parts = [test.part(mask) for index in chosen for mask in sides[index] if mask.any()]
    drawn = iter(draw(parts, samples, seed, progress)) if parts else iter(())

    records = []
    for index in chosen:
        one = Side(test, sides[index][0], next(drawn), level)
        other = Side(test, sides[index][1], next(drawn), level) if sides[index][1].any() else None
        key = {"field": levels["field"][index], "level": levels["level"][index]}
        records += [{**key, "measure": measure, **compare(one, other, measure, level, counted[index])} for measure in test.measures]
    columns = ["field", "level", "measure", "value", "low", "high", "others", "gap", "gap_low", "gap_high", "flagged", "counted", "classes"]
    table = pd.DataFrame(records, columns=columns).astype({"flagged": bool, "counted": bool})
    whole = test.part(np.ones(len(test.labels), dtype=bool)).measure(np.ones((test.size, 1)))
    overall = {measure: float(whole[measure][0]) for measure in test.measures}
    descriptions = {field.name: field.description or field.name for field in fields}
    return Subgroups(levels, table, overall, descriptions, len(ids), test.size, samples, seed, level)


def subgroups_of_run(opened: OpenedRun, samples: int = 1000, seed: int = 0) -> Subgroups:
    """Measure the subgroups of a run's test side; see `measure_subgroups`."""
    predictions = opened.run.predictions
    test = predictions[predictions["split"] == "test"]
    with progress_bar("subgroups") as show:
        return measure_subgroups(test, opened.rows("test"), opened.groups, opened.dataset.schema, samples, seed, progress=show)
