"""What a reader of a suite's page must know first: what was compared, what the intervals allow to say, and what spoils it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from dualrefnet.evaluation.tables import MEASURE_NAMES
from dualrefnet.figures.suite_lines import KEY, described, names, sizes, units
from dualrefnet.models.registry import METHODS
from dualrefnet.report.provenance import GAPS_TELL_THE_CLASS
from dualrefnet.report.section import Section
from dualrefnet.run import Run
from dualrefnet.suite.aggregate import LABEL_LEAKING, Aggregate, flags_of
from dualrefnet.suite.collect import Key, System, reads_image
from dualrefnet.suite.grid import expand
from dualrefnet.suite.notes import LESS_IS_BETTER
from dualrefnet.suite.tables import SIGNIFICANT

# Systems that a sentence names one by one; the pictures and tables have all of them.
LISTED = 16
PROTOCOLS = {"paper": "the paper's split", "grouped": "patients apart", "grouped-cv": "patients apart, in folds"}
LEAKING_SPLIT = "leaking split: the same patients or lesions in training and test"
# Flag of a system -> what it means, for a reader who doesn't know the word.
MEANINGS = {
    LABEL_LEAKING: "The gaps of the metadata were filled with the help of the diagnosis: a demonstration of that leak, no result",
    LEAKING_SPLIT: (
        "The split leaks: test photographs show patients or lesions that training has seen, so the numbers are too good for new patients"
    ),
    "drawn data, not clinical": (
        "Drawn pictures of invented lesions, made by a program: the numbers say that the software works, and nothing about medicine"
    ),
    "frozen encoder": "The image encoder was frozen and has learned nothing about skin: ways of fusion are compared, not whole systems",
    "encoder from random weights": "The image encoder started from random numbers, not from ImageNet",
}
GAPS = (
    "In this data set forms have gaps where a lesion was not biopsied, and those lesions are benign: a part of the score can come from the "
    "gaps alone. A new patient's gaps mean something else"
)


def glance_section(found: Aggregate, folder: Path) -> Section:
    """Return what was compared and what can be said of it, in the suite's first measure.

    Args:
        found: the tidy tables.
        folder: of the suite.
    """
    lead = []
    if len(found.systems):
        rows = described(found.systems, found.comparisons, found.collection.suite.measures[0])
        planned, finished = (int(rows[name].sum()) for name in ("planned", "runs"))
        systems = f"{len(rows)} systems are compared" if len(rows) > 1 else "One system is measured"
        lead.append(f"{systems}; {finished:,} of {planned:,} runs are finished. A run is one training, measured on photographs kept apart.")
        several = rows[["dataset", "protocol"]].drop_duplicates().shape[0] > 1
        for (dataset, protocol), members in rows.groupby(["dataset", "protocol"], sort=False):
            title, kind = _title(found, folder, str(dataset)), PROTOCOLS.get(str(protocol), str(protocol))
            # ISIC-2019 names its lesions, not its patients.
            kind = kind.replace("patients", units(members))
            tested = f"tested on {sizes(members[members['images'] > 0])}" if (members["images"] > 0).any() else "no result yet"
            sentences = [f"{title}, {kind}: {tested}.", *(sentence for sentence in _verdicts(found, members) if sentence)]
            lead += [" ".join(sentences)] if several else sentences
        if rows["low"].notna().any():
            lead.append(
                f"In brackets stands the 95% interval: had other {units(rows)} come, the number would likely lie in it. It takes the "
                "trained models as given; trained again they would change too."
            )
    for (dataset, protocol), rows in found.splits.groupby(["dataset", "protocol"], sort=False) if len(found.splits) else ():
        known, equal = int((rows["equal"] != "").sum()), int((rows["equal"] == "yes").sum())
        beside = f" {equal} of {known} counts are those of the paper's Table 1." if known else ""
        kind = PROTOCOLS.get(str(protocol), str(protocol))
        sides = ", ".join(f"{int(side['images'].sum()):,} {name}" for name, side in rows.groupby("split", sort=False))
        lead.append(f"Photographs of {dataset}, {kind}: {sides}.{beside}")
    return Section("glance", "At a glance", lead)


def suite_notes(found: Aggregate) -> list[str]:
    """Return what a reader must know before believing a number of the suite, each once, with the systems that it is about."""
    systems = found.collection.systems
    notes: dict[str, list[Key]] = {}
    for system in systems:
        for flag in flags_of(system):
            if flag != f"{len(system.runs)} of {system.planned} runs":
                notes.setdefault(MEANINGS.get(flag, f"{flag[0].upper()}{flag[1:]}"), []).append(system.key)
        if _reads_gaps(system):
            notes.setdefault(GAPS, []).append(system.key)
    rows = described(found.systems, found.comparisons, found.collection.suite.measures[0]) if systems else pd.DataFrame()
    result = [*_incomplete(found, rows), *(f"{note} ({_who(keys, rows)})." for note, keys in notes.items())]
    # Of counted splits nothing is trained, so that no system has a flag.
    leaking = [dataset for dataset, protocol in found.collection.splits if protocol == "paper"]
    if leaking and MEANINGS[LEAKING_SPLIT] not in notes:
        result.append(f"{MEANINGS[LEAKING_SPLIT]} ({', '.join(leaking)}).")
    return result


def _verdicts(found: Aggregate, rows: pd.DataFrame) -> Iterator[str]:
    """Yield what the first measure says of the systems of one data set and protocol, and not more."""
    measure, with_value = found.collection.suite.measures[0], rows[rows["pooled"].notna()]
    name = MEASURE_NAMES.get(measure, measure)
    references = with_value[with_value["is_reference"]]
    pairs = found.comparisons[found.comparisons["measure"] == measure]
    family = int(pairs["p_holm"].notna().sum())
    pairs = rows.merge(pairs[[*KEY, "difference", "p_holm", "note"]], on=KEY, suffixes=("_from_paper", ""))
    if len(references):
        each = _and([f"{row['name']} with {_value(row)}" for row in references.to_dict("records")])
        several = f"s in {name}: {each}. Each other system is compared with the one of them that is most like it."
        yield f"The reference{several if len(references) > 1 else f' in {name}: {each}.'}"
    elif len(with_value) > 1 and not len(pairs):
        reference = found.collection.suite.reference
        why = f"{reference}, the reference, is not among them" if reference else "The suite names no reference"
        yield f"{why}, so no difference is tested."
    leaking = pairs["flags"].str.contains(LABEL_LEAKING, regex=False)
    tested = pairs[pairs["p_holm"].notna() & ~leaking]
    if len(tested):
        yield from _tested(tested, name, measure in LESS_IS_BETTER)
        yield f"A difference counts where p < {SIGNIFICANT} after Holm's correction for {family} comparison{'s' * (family > 1)}."
    if leaking.any():
        yield f"Left out here, because the diagnosis is in its metadata: {_listed(pairs[leaking])}."
    for note, members in pairs[pairs["note"] != ""].groupby("note", sort=False):
        yield f"{str(note)[0].upper()}{str(note)[1:]} ({_listed(members)})."
    if not family and (pairs["note"] == "").any():
        yield f"No interval is drawn of {name}, so no difference is tested."
    yield _best(measure, with_value[~with_value["flags"].str.contains(LABEL_LEAKING, regex=False)], tested)


def _tested(rows: pd.DataFrame, name: str, less: bool) -> Iterator[str]:
    """Yield which systems differ from their reference, and which can't be told from it."""
    differs = rows["p_holm"] < SIGNIFICANT
    worse = rows["difference"] > 0 if less else rows["difference"] < 0
    unknown = "can't be told from the reference with these data, which doesn't mean that there is no difference"
    if not differs.any() or len(rows) == 1:
        which = rows["name"].iloc[0] if len(rows) == 1 else f"Each of the {len(rows)} systems compared"
        verdict = f"is {'worse' if worse.iloc[0] else 'better'} than the reference in {name}, by {rows['difference'].abs().iloc[0]:.3f}"
        yield f"{which} {verdict if differs.any() else unknown}."
        return
    sides = []
    for kind, chosen in (("worse", rows[differs & worse]), ("better", rows[differs & ~worse])):
        gaps = [f"{gap:.3f}" for gap in sorted(chosen["difference"].abs())]
        by = f" by {' to '.join(dict.fromkeys((gaps[0], gaps[-1])))}" if gaps else ""
        sides.append(f"{len(chosen) or 'none'} {'is' if len(chosen) < 2 else 'are'} {kind}{by}{f': {_listed(chosen)}' if by else ''}")
    yield f"In {name}, of {len(rows)} systems compared with the reference, {'; '.join(sides)}."
    rest = rows[~differs]
    if len(rest):
        yield f"The other {len(rest) if len(rest) > 1 else 'one'} {unknown}: {_listed(rest)}."


def _best(measure: str, rows: pd.DataFrame, tested: pd.DataFrame) -> str:
    """Name the system with the best value, and say how little or how much that means."""
    records: list[dict[str, Any]] = rows.to_dict("records")  # type: ignore[assignment]
    less, name = measure in LESS_IS_BETTER, MEASURE_NAMES.get(measure, measure)
    if not records:
        return ""
    best = max(records, key=lambda row: -row["pooled"] if less else row["pooled"])
    if len(records) == 1:
        return "" if best["is_reference"] else f"{best['name']}: {name} {_value(best)}."
    says = f"The {'lowest' if less else 'highest'} {name} is that of {best['name']}, {_value(best)}"
    if best["is_reference"]:
        return f"{says}."
    p = tested.loc[tested["name"] == best["name"], "p_holm"].tolist()
    if not p:
        return f"{says}; whether it is better than another isn't tested."
    return f"{says}, " + ("better than the reference." if p[0] < SIGNIFICANT else "which can't be told from the reference either.")


def _incomplete(found: Aggregate, rows: pd.DataFrame) -> Iterator[str]:
    """Say which runs and splits there are no results of."""
    missing = found.collection.missing
    if not len(missing):
        return
    runs = missing[missing["run"] != ""]
    if len(runs):
        planned, finished = (int(rows[name].sum()) for name in ("planned", "runs"))
        states = ", ".join(f"{count} {state}" for state, count in Counter(runs["state"]).items())
        partial, without = rows[rows["runs"] < rows["planned"]], rows[rows["runs"] == 0]
        keys = [Key(*key) for key in partial[KEY].itertuples(index=False, name=None)]
        yield (
            f"Incomplete: {finished:,} of {planned:,} runs are finished ({states}). Runs are missing of: {_who(keys, rows)}."
            + (f" No run at all is there of: {_listed(without)}." if len(without) else "")
            + " The numbers can change when the others are there; which they are stands at the end of the page."
        )
    splits = len(missing) - len(runs)
    if splits:
        yield f"Not counted yet: {splits} split{'s' * (splits > 1)} of the suite."


def _who(keys: Sequence[Key], rows: pd.DataFrame) -> str:
    """Name systems, or say that it is all of them."""
    reading = {system for system in map(tuple, rows[KEY].to_numpy()) if reads_image(system[2])}
    if len(rows) > 1 and len(keys) == len(rows):
        return "all systems"
    if len(keys) > 1 and set(keys) == reading:
        return "all systems that read images"
    return names(rows[[tuple(key) in set(keys) for key in rows[KEY].to_numpy()]])


def _reads_gaps(system: System) -> bool:
    method = METHODS.get(system.key.method)
    reads = method is not None and method.reads_metadata and system.key.dataset in GAPS_TELL_THE_CLASS
    return reads and any(run.recipe.metadata.tier in ("M2", "M3") for run in system.runs)


def _title(found: Aggregate, folder: Path, dataset: str) -> str:
    """Return a data set's name for people, from a run; without one that of its adapter."""
    for cell in expand(found.collection.suite):
        run = Run(folder / "runs" / cell.run)
        if cell.dataset == dataset and run.finished:
            return str(run.model.get("dataset", {}).get("title", dataset))
    return dataset


def _listed(rows: pd.DataFrame) -> str:
    found = list(dict.fromkeys(rows["name"]))
    return _and(found) if len(found) <= LISTED else f"{', '.join(found[:LISTED])} and {len(found) - LISTED} more"


def _and(parts: Sequence[str]) -> str:
    return " and ".join(part for part in (", ".join(parts[:-1]), parts[-1]) if part)


def _value(row: Mapping[Any, Any]) -> str:
    return f"{row['pooled']:.3f}" + ("" if pd.isna(row["low"]) else f" [{row['low']:.3f} to {row['high']:.3f}]")
