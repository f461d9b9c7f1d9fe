"""The section of a page that says whether the data and their split can be trusted."""

from __future__ import annotations

import numpy as np

from dualrefnet.audit.dataset_audit import Audit
from dualrefnet.audit.printed import printed_tables
from dualrefnet.evaluation.printed_table import Cell, PrintedTable
from dualrefnet.report.section import Section

# What is examined -> the finding ids that answer it, in plain words and in the order of the table.
QUESTIONS = (
    ("Are patients on one side only?", ("patients_on_two_sides",)),
    ("Are lesions on one side only?", ("lesions_on_two_sides",)),
    ("Are copies of a photograph on one side only?", ("near_duplicates",)),
    ("Is every photograph there under one id and one label?", ("near_duplicates_other", "identical_other_label", "identical_same_label")),
    ("Is what is missing silent about the class?", ("missing_block", "missing_mask")),
    ("Does no single column give the class away?", ("proxy",)),
    ("Are forms silent about who the patient is?", ("nearest_form", "reidentification", "form_alone")),
)
WORDS = {"PASS": "yes", "WARN": "not quite", "FAIL": "no"}
ORDER = ("FAIL", "WARN", "PASS")
# Of the tables these are for a page; the sentences of the verdicts say what the others hold.
TABLES = ("missing_models", "proxies", "form_alone")


def audited_section(audit: Audit) -> Section:
    """Return the verdicts, and the tables of what is missing, of single columns and of the form alone."""
    total = sum(audit.images.values())
    verdicts = {level: sum(finding.level == level for finding in audit.findings) for level in ORDER}
    lead = [
        f"{total:,} images of {audit.dataset} and their division into training ({audit.images['train']:,}), validation "
        f"({audit.images['val']:,}) and test ({audit.images['test']:,}) were examined for what makes numbers look better than they are: "
        f"the same {audit.group} or picture on two sides, and metadata that give the answer away. Of {len(audit.findings)} findings "
        f"{verdicts['FAIL']} forbid believing the numbers, and {verdicts['WARN']} are worth knowing."
    ]
    lead += [f"{finding.message[0].upper()}{finding.message[1:]}." for finding in audit.findings if finding.level == "FAIL"]
    blocks = audit.tables.get("missing_blocks")
    if blocks is not None and np.isfinite(blocks["malignant_missing"].iloc[0]):
        first = blocks.iloc[0]
        lead.append(
            f"Most often missing is the block “{first['block']}”: in {first['rows']:,} rows ({first['share']:.0%}), of which "
            f"{first['malignant_missing']:.0%} are cancers; of the other rows {first['malignant_present']:.0%} are."
        )
    printed = printed_tables(audit)
    chosen = [printed[name] for name in TABLES if name in printed]
    return Section("audit", "Can the data be trusted?", lead, [_verdicts(audit), *chosen])


def _verdicts(audit: Audit) -> PrintedTable:
    rows = []
    for question, checks in QUESTIONS:
        answers = sorted((finding for finding in audit.findings if finding.check in checks), key=lambda finding: ORDER.index(finding.level))
        if answers:
            worst = answers[0].level
            said = "; ".join(dict.fromkeys(finding.message for finding in answers if finding.level == worst))
            rows.append([Cell(question), Cell(WORDS[worst], bold=worst != "PASS"), Cell(said)])
    compared = [finding.message for finding in audit.findings if finding.check == "images_compared"]
    notes = [f"{message[0].upper()}{message[1:]}." for message in compared] or ["Photographs were not compared with each other."]
    return PrintedTable("What was asked of the data", ("Question", "Answer", "Why"), rows, tuple(notes), left=3)
