"""What the probes say, for people: printed tables and plain sentences."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from dualrefnet.evaluation.missing_patterns import EVERYTHING, NOTHING
from dualrefnet.evaluation.printed_table import Cell, PrintedTable
from dualrefnet.probes.availability import WITH, WITHOUT, Availability
from dualrefnet.probes.lead import MEASURES
from dualrefnet.probes.shortcuts import WHOLE, WHOLE_OUTLINED, Shortcuts

BALANCED = "balanced_accuracy"
# Said of the probes that a reader should know first.
_SAID = {
    "gaps": "when it is given nothing but which answers are missing",
    "background_alone": "when the lesion is filled with skin colour and the form is another {unit}'s",
    "other_photographs": "when the form is right and the photograph another {unit}'s",
    "other_forms": "when the photograph is right and the form another {unit}'s",
    "photograph_and_gaps": "when the photograph is right and of the form only which answers are missing",
}


def shortcut_table(shortcuts: Shortcuts) -> PrintedTable:
    """Return one row an input: what the model reaches with it, and what a model does that was trained for it."""
    values = {(row["probe"], row["measure"]): row for row in shortcuts.table.to_dict("records")}
    asked = shortcuts.table[~shortcuts.table["trained"]].drop_duplicates("probe")
    cancer = (WHOLE, MEASURES[2]) in values
    rows = []
    for probe, given, trained in zip(asked["probe"], asked["input"], asked["trained_probe"], strict=True):
        row = [Cell(given), _cell(values[probe, BALANCED]), _kept(values[probe, BALANCED]), _cell(values[probe, MEASURES[1]])]
        row += [_cell(values[probe, MEASURES[2]])] if cancer else []
        rows.append([*row, _cell(values.get((trained, BALANCED)))])
    columns = [
        "the model is given",
        "balanced accuracy",
        "lead kept",
        "macro AUC",
        *(["malignant AUC"] if cancer else []),
        "trained for it",
    ]
    whole = values[WHOLE, BALANCED]
    notes = [
        f"Guessing reaches a balanced accuracy of {whole['chance']:.3f} and AUCs of 0.5. Lead kept: of the balanced accuracy over chance "
        "that the whole input gives on the same photographs. The shares needn't add up to 100%: inputs that tell the same can each do "
        "without the other.",
        "Trained for it: balanced accuracy of a logistic regression that was trained on that input alone. Where it is much higher, the "
        "input holds more than the model makes of it when it is asked with that alone.",
        f"{_sizes(shortcuts)} In brackets: 95% intervals from resampling {shortcuts.unit}s; exchanges between {shortcuts.unit}s: mean of "
        f"{shortcuts.permutations}.",
        *(f"{remark[0].upper()}{remark[1:]}." for remark in shortcuts.remarks),
    ]
    return PrintedTable(f"How much of the score is shortcut? {shortcuts.title}", tuple(columns), rows, tuple(notes))


def shortcut_sentences(shortcuts: Shortcuts) -> list[str]:
    """Say in plain words what is left of the lead over chance with parts of the input."""
    found = {row["probe"]: row for row in shortcuts.table[shortcuts.table["measure"] == BALANCED].to_dict("records")}
    whole = found[WHOLE]
    start = f"Guessing reaches a balanced accuracy of {whole['chance']:.2f}, this model {whole['value']:.2f}"
    if pd.isna(whole["lead"]):
        return [f"{start}: a lead over chance can't be told from none, so it can't be shared out."]
    said = [f"{start}. What is left of that lead:"]
    for probe, words in _SAID.items():
        if probe in found and not pd.isna(found[probe]["lead"]):
            row = found[probe]
            kept, low, high = (f"{max(row[key], 0):.0%}" for key in ("lead", "lead_low", "lead_high"))
            said.append(f"{kept} [{low} to {high}] {words.format(unit=shortcuts.unit)};")
    if len(said) == 1:
        return [f"{start}. No input could be taken away from it."]
    return [" ".join(said)[:-1] + "."]


def availability_table(availability: Availability) -> PrintedTable:
    """Return balanced accuracy by the share of the recorded answers that are kept."""
    curve = availability.curve[availability.curve["measure"] == BALANCED]
    photographs = [name for name in (WITH, WITHOUT) if (curve["photograph"] == name).any()]
    values = {(row["photograph"], row["share"]): row for row in curve.to_dict("records")}
    rows = []
    for share, answers in curve.drop_duplicates("share")[["share", "answers_kept"]].itertuples(index=False):
        rows.append([Cell(f"{share:.0%}"), Cell(f"{answers:.1f}"), *(_cell(values[name, share]) for name in photographs)])
    return PrintedTable(
        f"Balanced accuracy by how much of the form is there: {availability.name}",
        ("answers kept", "on average", *photographs),
        rows,
        (_drawn(availability),),
    )


def pattern_table(availability: Availability) -> PrintedTable:
    """Return balanced accuracy by patterns of missing answers."""
    table = availability.patterns[availability.patterns["measure"] == BALANCED]
    photographs = [name for name in (WITH, WITHOUT) if (table["photograph"] == name).any()]
    values = {(row["photograph"], row["removed"]): row for row in table.to_dict("records")}
    rows = []
    for row in table.drop_duplicates("removed").to_dict("records"):
        share = "" if pd.isna(row["training_share"]) else f"{row['training_share']:.0%}"
        cells = [_cell(values[name, row["removed"]]) for name in photographs]
        rows.append([Cell(row["pattern"]), Cell(share), Cell(f"{row['answers_kept']:.1f}"), *cells])
    columns = ("what is there", "of training", "answers", *photographs)
    note = (
        "Of training: the share of the training rows in which exactly these answers are missing. What a test row itself misses is missing "
        "too."
    )
    return PrintedTable(f"Balanced accuracy by what is missing: {availability.name}", columns, rows, (note, _drawn(availability)))


def difference_table(differences: pd.DataFrame, first: str, second: str) -> PrintedTable:
    """Return how far one run is above another, by what is there; see `compare_availability`."""
    rows = []
    table = differences[differences["measure"] == BALANCED]
    # The whole form and no form are shares too.
    said = [name for name, share in ((NOTHING, 0), (EVERYTHING, 1)) if (table["share"] == share).any()]
    for row in table[~table["pattern"].isin(said)].to_dict("records"):
        there = row["pattern"] or f"{row['share']:.0%} of the answers"
        cell = Cell(_signed(row["difference"]), f"[{_signed(row['low'])}, {_signed(row['high'])}]")
        rows.append([Cell(f"{row['photograph']}, {there}"), Cell(f"{row['first']:.3f}"), Cell(f"{row['second']:.3f}"), cell])
    note = "An interval that leaves out 0 tells the two apart; of so many, one in twenty does by chance."
    return PrintedTable(f"Balanced accuracy: {first} and {second}", ("what is there", first, second, "difference"), rows, (note,))


def _sizes(shortcuts: Shortcuts) -> str:
    sizes = {row["probe"]: row for row in shortcuts.table.to_dict("records")}
    whole = sizes[WHOLE]
    text = f"{whole['images']:,} test photographs of {whole['patients']:,} {shortcuts.unit}s"
    if WHOLE_OUTLINED in sizes:
        text += f", {sizes[WHOLE_OUTLINED]['images']:,} of them with an outline of the lesion"
    return f"{text}."


def _drawn(availability: Availability) -> str:
    return (
        f"{len(availability.image_ids):,} test photographs, {availability.fields} questions; mean of {availability.draws} random choices "
        f"of answers (seed {availability.seed}). In brackets: 95% intervals from resampling {availability.unit}s. Guessing reaches "
        f"{availability.chance:.3f}."
    )


def _cell(row: Mapping[Any, Any] | None) -> Cell:
    if row is None or pd.isna(row["value"]):
        return Cell("–")
    return Cell(f"{row['value']:.3f}", "" if pd.isna(row["low"]) else f"[{row['low']:.2f}, {row['high']:.2f}]")


def _kept(row: Mapping[Any, Any]) -> Cell:
    if pd.isna(row["lead"]) or row["probe"] in (WHOLE, WHOLE_OUTLINED):
        return Cell("–")
    # Less than chance is nothing kept, as far as a reader is concerned; the exact share stands in the CSV.
    return Cell(*(f"{max(row['lead'], 0):.0%}", f"[{max(row['lead_low'], 0):.0%}, {max(row['lead_high'], 0):.0%}]"))


def _signed(value: float) -> str:
    return f"{value:+.3f}".replace("-", "−")
