"""The section on pictures that aren't like those of the training."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np

from dualrefnet.evaluation.out_of_scope import CLOSE_LESION, EVERYDAY, FEW_SOURCES, LESIONS, SKIN, OutOfScopeMeasured
from dualrefnet.evaluation.printed_table import Cell, PrintedTable
from dualrefnet.figures.out_of_scope import draw_out_of_scope
from dualrefnet.models.out_of_scope import FALSE_ALARMS
from dualrefnet.report.section import Section

Row = Mapping[Hashable, Any]


def out_of_scope_section(measured: OutOfScopeMeasured, group: str = "patient") -> Section:
    """Return the section.

    Args:
        measured: from `measure_out_of_scope`.
        group: what a group of test photographs is called, `patient` or `lesion`.
    """
    rows: dict[str, Row] = {row["group"]: row for row in measured.table.to_dict("records")}
    lesions, everyday = rows[LESIONS], rows[EVERYDAY]
    lead = [
        "A classifier answers whatever picture it is given, a cup of coffee as well. So each picture is compared with the photographs that "
        "the model was trained on, by what its image encoder makes of it, and the predictor warns of what is unlike them.",
        f"Of {lesions['pictures']:,} test photographs of lesions {_share(lesions)} were warned of without need ({FALSE_ALARMS:.0%} were "
        f"meant to be). Of {everyday['pictures']:,} pictures without a lesion, from {everyday['sources']} files and drawing programs, "
        f"{_share(everyday)} were warned of. Of all pairs of such a picture and a lesion, {everyday['auroc']:.1%}"
        f"{_interval(everyday, 'auroc', '.1%')} were put in the right order (AUROC; 50% is chance).",
    ]
    if measured.skin_auroc is not None:
        value, low, high = measured.skin_auroc
        skin, close = rows[SKIN], rows[CLOSE_LESION]
        between = "" if np.isnan(low) else f" [{low:.2f} to {high:.2f}]"
        told = "tells" if low > 0.5 else "doesn't reliably tell"
        lead.append(
            f"The hardest case is skin without a lesion. Of squares of skin cut out beside the lesion, {_share(skin)} were warned of, of "
            f"squares of the same size around the lesion {_share(close)}: part of that is enlargement. The score {told} the two apart "
            f"(AUROC {value:.2f}{between}). A photograph of healthy skin will often pass without a warning."
        )
    lead.append(
        "No warning doesn't mean that the picture shows a lesion, and least of all that the answer is right: a lesion of a kind that the "
        "model never saw may look familiar to it."
    )
    return Section("out_of_scope", "Pictures that show no lesion", lead, [_table(measured, group), draw_out_of_scope(measured)])


def _table(measured: OutOfScopeMeasured, group: str) -> PrintedTable:
    rows = [
        [
            Cell(row["group"]), Cell(f"{row['pictures']:,}", f"of {row['sources']}"),
            Cell("") if np.isnan(row["auroc"]) else Cell(f"{row['auroc']:.3f}", _interval(row, "auroc", ".3f").strip()),
            Cell(f"{row['flagged']:.1%}", _interval(row, "flagged", ".1%").strip()),
        ]
        for row in measured.table.to_dict("records")
    ]  # fmt: skip
    notes = (
        f"Small in the second column: how many {group}s, files or drawing programs the pictures are of. In brackets: 95% of "
        f"{measured.samples:,} resamples of {group}s and sources; none for fewer than {FEW_SOURCES} sources. Where all or none were warned "
        "of, Wilson's interval.",
        "The first three groups after the lesions are photographs, documents and areas that nobody would take for skin; the score was "
        "chosen with others of their kind.",
        f"Fitted on {measured.training:,} training photographs, limit from {measured.validation:,} validation photographs, seed "
        f"{measured.seed}.",
    )
    return PrintedTable("Pictures and warnings", ("group", "pictures", "AUROC", "warned of"), rows, notes)


def _share(row: Row) -> str:
    return f"{row['flagged']:.1%}{_interval(row, 'flagged', '.1%')}"


def _interval(row: Row, name: str, how: str) -> str:
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    return "" if np.isnan(low) else f" [{low:{how}}, {high:{how}}]"
