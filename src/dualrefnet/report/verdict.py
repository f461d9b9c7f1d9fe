"""The verdict that a report begins with: five questions, each answered by what a section measured.

Every threshold stands here with its reason. A question is as bad as the worst of its findings; what was not measured is
no finding, and a question without one has no colour.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pandas as pd

from dualrefnet.analysis.audit import TOLERATED_SHARE
from dualrefnet.data.check import Finding, Level
from dualrefnet.data.schema import unnamed_patients
from dualrefnet.display.format import estimate, interval_of, listed, number, percent, sentence
from dualrefnet.display.page import Line, Result, Section, Verdict
from dualrefnet.runtime.availability import AS_RECORDED, IMAGE_ONLY, missingness_shortcut

if TYPE_CHECKING:
    from dualrefnet.analysis.audit import Audit
    from dualrefnet.analysis.out_of_distribution import OutOfDistributionMeasured
    from dualrefnet.analysis.shortcuts import Shortcuts
    from dualrefnet.analysis.subgroups import Subgroups

LEAK, SHORTCUT, CALIBRATION, OUT_OF_DISTRIBUTION, SUBGROUPS = QUESTIONS = (
    "leak",
    "shortcut",
    "calibration",
    "out-of-distribution",
    "subgroups",
)
# From the worst to the best.
WORST_FIRST: tuple[Level, ...] = ("FAIL", "WARN", "PASS")
# Sentences of a line: what matters must be read at a glance.
MOST = 2
# Share of the gain over chance that is left with which fields are missing alone, or with the background alone. Neither
# says anything of a lesion: a tenth is worth knowing, and with half the score is mostly that.
SHORTCUT_GAIN = {"WARN": 0.1, "FAIL": 0.5}
# Percentage points, summed over the classes, that nobody would notice.
SMALL_POINTS = 1.0
# Expected calibration error beyond what a perfectly calibrated model has by chance: at a tenth, a stated 90% is 80%.
LARGE_ERROR = 0.1
# Share of everyday images that must be flagged: a gate that passes one in ten is leaky, one that passes half is none.
FLAGGED = {"WARN": 0.9, "FAIL": 0.5}
# Gaps are many, and one in twenty excludes 0 by chance: more than so many standard deviations (of a Poisson number)
# above that are no chance.
BY_CHANCE = 1.64


def judge_leak(
    leakage: Mapping[str, Mapping[str, Any] | None], unit: str = "patient", imputed_from_label: bool = False
) -> list[Finding]:
    """Judge which test images show a patient or a lesion of training, as metrics.json counts them."""
    findings: list[Finding] = []
    if imputed_from_label:
        findings.append(Finding("FAIL", LEAK, "missing metadata were imputed from the diagnosis"))
    known = {name: leak["train_or_val"] for name, leak in leakage.items() if leak is not None}
    for name, share in known.items():
        if share:
            text = f"{share:.1%} of the test images show a {name} of training or validation"
            findings.append(Finding("FAIL" if share > TOLERATED_SHARE else "WARN", LEAK, text))
    if unit != "patient":
        findings.append(Finding("WARN", LEAK, unnamed_patients(unit)))
    clean = " or ".join(name for name, share in known.items() if not share)
    return [*findings, *([Finding("PASS", LEAK, f"no {clean} crosses the split")] if clean else [])]


def judge_audit(audit: Audit) -> list[Finding]:
    """Judge near-duplicates across the split, and features that follow from the diagnosis."""
    findings = [
        Finding(finding.level, LEAK, finding.message)
        for finding in audit.findings
        if finding.check == "near_duplicates"
    ]
    columns = audit.tables.get("proxies", pd.DataFrame(columns=["column", "feature", "verdict"]))
    for level in WORST_FIRST[:2]:
        names = columns.loc[columns["feature"].astype(bool) & (columns["verdict"] == level), "column"].tolist()
        if names:
            findings.append(Finding(level, LEAK, f"metadata fields may follow from the diagnosis: {listed(names)}"))
    return findings


def judge_missingness(metrics: Mapping[str, Any]) -> list[Finding]:
    """Judge whether the model takes missing metadata for a sign of benign."""
    shortcut = missingness_shortcut(metrics)
    if shortcut is not None:
        return [Finding("FAIL", SHORTCUT, f"not to be used where metadata may be missing: {shortcut}")]
    inputs = metrics["availability"]["inputs"]
    full, without = (inputs.get(name, {}).get("cancers_referred") for name in (AS_RECORDED, IMAGE_ONLY))
    if full is None or without is None:
        return []
    text = f"without metadata {without:.0%} of the cancers are referred, with them {full:.0%}"
    return [Finding("PASS", SHORTCUT, text)]


def judge_shortcuts(shortcuts: Shortcuts) -> list[Finding]:
    """Judge what of the gain over chance inputs keep that show no lesion."""
    table = shortcuts.table[shortcuts.table["measure"] == "balanced_accuracy"].set_index("probe")
    findings: list[Finding] = []
    for probe, what in (("gaps", "which fields are missing alone"), ("background_alone", "the background alone")):
        row = table.loc[probe] if probe in table.index else None
        if row is None or pd.isna(row["lead"]):
            continue
        share = max(0.0, float(row["lead"]))
        proven = row["lead_low"] > 0 and share >= SHORTCUT_GAIN["WARN"]
        level: Level = "PASS" if not proven else "FAIL" if share >= SHORTCUT_GAIN["FAIL"] else "WARN"
        findings.append(Finding(level, SHORTCUT, f"{what} keeps {share:.0%} of the gain over chance"))
    return findings


def judge_flags(importance: Mapping[str, float], flags: str) -> list[Finding]:
    """Judge whether the flags of missing fields move the probabilities more than any field."""
    most = max((name for name in importance if name != flags), key=lambda name: importance[name], default=None)
    if flags not in importance or most is None:
        return []
    points = f"{importance[flags]:.0f} points against {importance[most]:.0f} of {most}"
    if importance[flags] > max(importance[most], SMALL_POINTS):
        return [Finding("FAIL", SHORTCUT, f"flags of missing fields move the probabilities most: {points}")]
    return [Finding("PASS", SHORTCUT, f"flags of missing fields move the probabilities less than a field: {points}")]


def judge_localisation(energy: Mapping[Any, Any]) -> list[Finding]:
    """Judge whether more of the saliency lies in the lesion than of a centred spot that has seen no image."""
    level: Level = "PASS" if energy["difference_low"] > 0 else "WARN"
    word = {True: "better than", False: "no better than"}[level == "PASS"]
    word = "worse than" if energy["difference_high"] < 0 else word
    inside = estimate(energy["value"], energy["low"], energy["high"], ".0%")
    shares = f"{inside} of the saliency lies inside, {energy['baseline']:.0%} of the spot's"
    return [Finding(level, SHORTCUT, f"Grad-CAM finds the lesion {word} a centred spot: {shares}")]


def judge_calibration(metrics: Mapping[str, Any]) -> list[Finding]:
    """Judge the calibration error against what a perfectly calibrated model has by chance."""
    calibrated = metrics.get("calibrated")
    if calibrated is None:
        text = f"the run has no calibration; the expected calibration error is {number(metrics['ece'])}"
        return [Finding("WARN", CALIBRATION, text)]
    after = calibrated["after"]
    error, chance = after["ece"], (after.get("ece_by_chance") or (0, 0))[1]
    level: Level = "PASS" if error <= chance else "FAIL" if error >= LARGE_ERROR else "WARN"
    compared = "no more" if level == "PASS" else "more"
    text = (
        f"probabilities are off by {100 * error:.0f} points on average, {compared} than by chance ({100 * chance:.0f})"
    )
    return [Finding(level, CALIBRATION, text)]


def judge_decisions(metrics: Mapping[str, Any]) -> list[Finding]:
    """Judge the coverage of the conformal sets and the sensitivity of the referral against their targets."""
    calibrated = metrics["calibrated"]
    sets = calibrated["conformal"]
    held = sets["marginal"]["promise"] != "missed"
    text = f"sets hold the true class of {percent(sets['marginal'], 'coverage')} (target {sets['promised']:.0%})"
    findings = [Finding("PASS" if held else "FAIL", CALIBRATION, text)]
    referral = calibrated["referral"]
    if referral is not None and referral["sensitivity"] is not None:
        _, high = referral.get("sensitivity_ci95") or (0, 1)
        level: Level = "PASS" if referral["reached"] else "FAIL" if high < referral["wanted"] else "WARN"
        text = (
            f"referral finds {percent(referral, 'sensitivity')} of the cancers (target {referral['wanted']:.0%}), and "
            f"spares {percent(referral, 'specificity')} of benign images"
        )
        findings.append(Finding(level, CALIBRATION, text))
    return findings


def judge_out_of_distribution(measured: OutOfDistributionMeasured) -> list[Finding]:
    """Judge how many everyday images are flagged, and whether healthy skin differs from lesions."""
    from dualrefnet.analysis.out_of_distribution import EVERYDAY, LESIONS, SKIN

    flagged = measured.table.set_index("group")["flagged"]
    share = float(flagged[EVERYDAY])
    level: Level = "FAIL" if share < FLAGGED["FAIL"] else "WARN" if share < FLAGGED["WARN"] else "PASS"
    text = f"{share:.0%} of everyday images are flagged, and {flagged[LESIONS]:.0%} of the lesions"
    findings = [Finding(level, OUT_OF_DISTRIBUTION, text)]
    if measured.skin_auroc is not None:
        apart = measured.skin_auroc.low > 0.5
        told = "the score tells them from lesions" if apart else "the score does not tell them from lesions"
        text = f"{flagged[SKIN]:.0%} of crops of healthy skin are flagged: {told}"
        findings.append(Finding("PASS" if apart else "WARN", OUT_OF_DISTRIBUTION, text))
    return findings


def judge_subgroups(subgroups: Subgroups) -> list[Finding]:
    """Judge whether more gaps exclude 0 than by chance, and whether cancers are among what a category misses."""
    looked_at, flagged = subgroups.looked_at, subgroups.flagged
    if not looked_at:
        return [Finding("WARN", SUBGROUPS, "no category has enough images to be compared")]
    text = f"{flagged} of {looked_at} gaps exclude 0 (about {subgroups.by_chance:.0f} by chance)"
    beyond = flagged > subgroups.by_chance + BY_CHANCE * math.sqrt(subgroups.by_chance)
    findings = [Finding("WARN" if beyond else "PASS", SUBGROUPS, text)]
    table = subgroups.table
    missed = table[(table["measure"] == "malignant.sensitivity") & (table["gap_high"] < 0)]
    if len(missed):
        row = missed.sort_values("gap").iloc[0]
        values = f"{estimate(row['value'], row['low'], row['high'], '.0%')}, of others {row['others']:.0%}"
        text = f"fewer cancers are predicted to be malignant in {row['field']} = {row['level']}: {values}"
        findings.insert(0, Finding("FAIL" if beyond else "WARN", SUBGROUPS, text))
    return findings


def make_verdict(metrics: Mapping[str, Any], classes: int, sections: Sequence[Section]) -> Verdict:
    """Return the head of a report: headline numbers, and the worst findings of the sections on each question."""
    lines = []
    for question in QUESTIONS:
        found = [(finding, section.key) for section in sections for finding in section.findings]
        found = [(finding, key) for finding, key in found if finding.check == question]
        level = next((level for level in WORST_FIRST if any(finding.level == level for finding, _ in found)), "")
        worst = [(finding, key) for finding, key in found if finding.level == level][:MOST]
        text = " ".join(sentence(finding.message) for finding, _ in worst)
        lines.append(Line(question, level, text, worst[0][1] if worst else ""))
    return Verdict(list(_results(metrics, classes)), lines)


def _results(metrics: Mapping[str, Any], classes: int) -> list[Result]:
    chance = {"balanced_accuracy": f"chance {1 / classes:.3f}", "auc_macro_ovr": "chance 0.500"}
    names = {"balanced_accuracy": "balanced accuracy", "auc_macro_ovr": "macro AUC"}
    results = [Result(names[key], number(metrics[key]), interval_of(metrics, key), chance[key]) for key in names]
    referral = (metrics.get("calibrated") or {}).get("referral")
    if referral is not None and referral["sensitivity"] is not None:
        spared = f"and {1 - referral['specificity']:.0%} of benign images" if referral["benign"] else ""
        referred = interval_of(referral, "sensitivity", ".0%")
        results.append(Result("cancers referred", f"{referral['sensitivity']:.0%}", referred, spared))
    elif "malignant" in metrics:
        found = metrics["malignant"]
        bounds = interval_of(found, "sensitivity")
        results.append(Result("sensitivity for cancer", number(found["sensitivity"]), bounds, "no referral threshold"))
    return results
