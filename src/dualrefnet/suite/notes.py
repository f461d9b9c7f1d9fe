"""What stands below the printed tables: what the numbers mean, what the protocol leaks, what is wrong with the paper's."""

from __future__ import annotations

import numpy as np
import pandas as pd

from dualrefnet.evaluation.tables import MEASURE_NAMES
from dualrefnet.models.registry import METHODS
from dualrefnet.suite.aggregate import Aggregate
from dualrefnet.suite.collect import Key, System
from dualrefnet.suite.paper import caveats

DAGGER = "†"
LESS_IS_BETTER = ("ece", "brier", "log_loss")
_CLASS_TABLES = {"pad_ufes_20": "2a", "isic_2019": "2b"}


def group_notes(found: Aggregate, members: list[Key]) -> tuple[str, ...]:
    """Return the notes below the main table of one data set and protocol.

    Args:
        found: the tidy tables.
        members: the systems of the table.
    """
    suite = found.collection.suite
    systems = [system for system in found.collection.systems if system.key in members]
    rows = found.systems[found.systems["dataset"].eq(members[0].dataset) & found.systems["protocol"].eq(members[0].protocol)]
    sizes = rows.loc[rows["images"] > 0, ["images", "groups"]].drop_duplicates().to_numpy()
    kind = "lesions" if members[0].dataset == "isic_2019" else "patients"
    tested = " or ".join(f"{images} images of {groups} {kind}" for images, groups in sizes) or "nothing yet"
    notes = [
        "Value [95% interval]: the test predictions of all folds put together, measured once a seed, averaged over seeds. "
        f"The interval comes from {found.samples} bootstrap samples of {kind} and takes the trained models as given. Tested on: {tested}.",
        "Bold: the best value of the column; that is no statement about significance.",
    ]
    if rows["sd"].notna().any():
        notes.append("Mean ± standard deviation: over runs (folds × seeds), each measured on its own test fold.")
    drawn = rows[rows["pooled"].notna()].groupby("measure", sort=False)["low"].count()
    bare = [MEASURE_NAMES.get(measure, measure) for measure in suite.measures if not drawn.get(measure, True)]
    if bare:
        notes.append(f"No interval is drawn of: {'; '.join(bare)}.")
    compared = found.comparisons[found.comparisons["dataset"].isin([members[0].dataset])]
    if len(compared):
        family = int((found.comparisons["measure"] == suite.measures[0]).sum())
        notes.append(
            f"*: differs from {suite.reference}, p < .05 after Holm's correction for {family} comparisons a measure; p two-sided, from the "
            "same bootstrap samples for both."
        )
    if rows["encoder"].eq("frozen").any():
        notes.append(
            "Frozen encoder: what it makes of every image was computed once, and the rest was trained on that: no augmentation, and the "
            "auxiliary task has no effect. It compares ways of fusion, not whole systems."
        )
    notes += [f"{message}." for system in systems for message in _leaks(system)][:2]
    methods = dict.fromkeys(key.method for key in members)
    for method in methods:
        known = METHODS.get(method)
        if known and known.reconstruction:
            notes.append(f"{DAGGER} {known.title} is reconstructed in part: {known.reconstruction}.")
    if rows["paper"].notna().any():
        tables = [system.paper.get("table") or suite.table or "" for system in systems]
        notes += [note for table in dict.fromkeys(tables) for note in caveats(members[0].dataset, table, methods)]
    return tuple(dict.fromkeys(notes))


def class_notes(key: Key) -> tuple[str, ...]:
    """Return the notes below a table by class."""
    return tuple(caveats(key.dataset, _CLASS_TABLES.get(key.dataset, ""), [key.method]))


def split_notes(dataset: str, rows: pd.DataFrame) -> tuple[str, ...]:
    """Return the notes below the counts of a split."""
    known, unequal = int((rows["equal"] != "").sum()), int((rows["equal"] == "NO").sum())
    if not known:
        return ()
    said = f"all {known} counts are those of Table 1" if not unequal else f"{unequal} of {known} counts are NOT those of Table 1 (≠)"
    return (f"Beside the paper: {said}.", *caveats(dataset, "1", []))


def _leaks(system: System) -> list[str]:
    """Say what the training sides of a system's runs give away of their test sides."""
    result = []
    for name in ("patient", "lesion"):
        shares = [shares for run in system.runs if (shares := (run.metrics.get("leakage") or {}).get(name))]
        if not shares:
            continue
        train, seen = (float(np.mean([share[side] for share in shares])) for side in ("train", "train_or_val"))
        if seen:
            result.append(
                f"LEAK: {train:.1%} of the test images show a {name} that is also in train ({seen:.1%} with validation), so the "
                "numbers are too good"
            )
        else:
            result.append(f"No test image shows a {name} of train or validation")
    return result
