"""The verdict of a report: every question in every colour, from what the sections measured."""

from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest

from dualrefnet.analysis.out_of_distribution import EVERYDAY, LESIONS, SKIN
from dualrefnet.data.check import Finding
from dualrefnet.display.page import Section
from dualrefnet.evaluation.bootstrap import Estimate
from dualrefnet.report import verdict
from dualrefnet.report.verdict import make_verdict


def leak(patient: float | None, lesion: float | None = None, unit: str = "patient") -> list[Finding]:
    shares = {"patient": patient, "lesion": lesion}
    known = {name: None if share is None else {"train": share, "train_or_val": share} for name, share in shares.items()}
    return verdict.judge_leak(known, unit)


def missingness(found: float, mean: float) -> list[Finding]:
    full = {"cancers_referred": 0.9, "cancers_at_recorded_threshold": 0.9, "mean_malignancy": 0.4}
    without = {"cancers_referred": 0.9, "cancers_at_recorded_threshold": found, "mean_malignancy": mean}
    return verdict.judge_missingness({"availability": {"inputs": {"as_recorded": full, "image_only": without}}})


def probes(lead: float, low: float = 0.01, probe: str = "gaps") -> list[Finding]:
    row = {"probe": probe, "measure": "balanced_accuracy", "lead": lead, "lead_low": low}
    return verdict.judge_shortcuts(SimpleNamespace(table=pd.DataFrame([row])))  # type: ignore[arg-type]


def flags(points: float) -> list[Finding]:
    return verdict.judge_flags({"age": 7.0, "flags": points, "region": 5.0}, "flags")


def localisation(low: float, high: float) -> list[Finding]:
    energy = {"value": 0.3, "low": 0.25, "high": 0.35, "baseline": 0.28}
    return verdict.judge_localisation({**energy, "difference_low": low, "difference_high": high})


def calibration(error: float = 0.03, promise: str = "within", reached: bool = True, high: float = 1.0) -> list[Finding]:
    after = {"ece": error, "ece_by_chance": [0.02, 0.05]}
    referral = {
        "sensitivity": 0.9,
        "sensitivity_ci95": [0.8, high],
        "wanted": 0.95,
        "reached": reached,
        "specificity": 0.5,
    }
    sets = {"marginal": {"coverage": 0.9, "promise": promise}, "promised": 0.9}
    metrics = {"calibrated": {"after": after, "conformal": sets, "referral": referral}}
    return [*verdict.judge_calibration(metrics), *verdict.judge_decisions(metrics)]


def other_images(flagged: float, skin: Estimate | None = None) -> list[Finding]:
    table = pd.DataFrame({"group": [LESIONS, EVERYDAY, SKIN], "flagged": [0.05, flagged, 0.02]})
    return verdict.judge_out_of_distribution(SimpleNamespace(table=table, skin_auroc=skin))  # type: ignore[arg-type]


def subgroups(flagged: int, gap_high: float = 0.1, looked_at: int = 40) -> list[Finding]:
    row = {"field": "region", "level": "ARM", "measure": "malignant.sensitivity", "value": 0.4, "low": 0.3, "high": 0.5}
    table = pd.DataFrame([{**row, "others": 0.8, "gap": -0.4, "gap_low": -0.6, "gap_high": gap_high}])
    found = SimpleNamespace(looked_at=looked_at, flagged=flagged, by_chance=0.05 * looked_at, table=table)
    return verdict.judge_subgroups(found)  # type: ignore[arg-type]


CASES: dict[str, tuple[str, list[Finding]]] = {
    "no patient in both": ("PASS", leak(0.0, 0.0)),
    "one image in a thousand": ("WARN", leak(0.001)),
    "lesions alone are named": ("WARN", leak(None, 0.0, "lesion")),
    "nothing is named": ("WARN", leak(None, unit="image")),
    "half of the test images": ("FAIL", leak(0.5)),
    "imputed from the diagnosis": ("FAIL", verdict.judge_leak({"patient": None}, imputed_from_label=True)),
    "missing means benign": ("FAIL", missingness(0.06, 0.2)),
    "missing means nothing": ("PASS", missingness(0.9, 0.4)),
    "missingness keeps nothing": ("PASS", probes(0.3, low=-0.1)),
    "missingness keeps a fifth": ("WARN", probes(0.2)),
    "the background keeps most": ("FAIL", probes(0.6, probe="background_alone")),
    "flags move less than a field": ("PASS", flags(6.0)),
    "flags move most": ("FAIL", flags(43.0)),
    "saliency in the lesion": ("PASS", localisation(0.01, 0.05)),
    "saliency as a spot": ("WARN", localisation(-0.01, 0.05)),
    "saliency beside the lesion": ("WARN", localisation(-0.05, -0.01)),
    "calibrated": ("PASS", calibration()),
    "never calibrated": ("WARN", verdict.judge_calibration({"ece": 0.04})),
    "off by more than by chance": ("WARN", calibration(0.06)),
    "off by a fifth": ("FAIL", calibration(0.2)),
    "sets miss their target": ("FAIL", calibration(promise="missed")),
    "referral may reach its target": ("WARN", calibration(reached=False)),
    "referral misses its target": ("FAIL", calibration(reached=False, high=0.93)),
    "other images are flagged": ("PASS", other_images(0.95, Estimate(0.8, 0.7, 0.9))),
    "healthy skin passes": ("WARN", other_images(0.95, Estimate(0.5, 0.4, 0.6))),
    "some pass": ("WARN", other_images(0.7)),
    "most pass": ("FAIL", other_images(0.3)),
    "gaps as by chance": ("PASS", subgroups(2)),
    "more gaps than by chance": ("WARN", subgroups(8)),
    "a gap in the cancers found": ("WARN", subgroups(2, gap_high=-0.2)),
    "gaps, and cancers are missed": ("FAIL", subgroups(8, gap_high=-0.2)),
    "nobody to compare": ("WARN", subgroups(0, looked_at=0)),
}


def worst(findings: list[Finding]) -> str:
    return next(level for level in verdict.WORST_FIRST if level in {finding.level for finding in findings})


@pytest.mark.parametrize("case", CASES)
def test_a_measurement_has_its_colour(case: str) -> None:
    level, findings = CASES[case]
    assert worst(findings) == level
    assert {finding.check for finding in findings} <= set(verdict.QUESTIONS)


def test_every_question_has_every_colour() -> None:
    seen = {(findings[0].check, level) for level, findings in CASES.values()}
    assert seen == {(question, level) for question in verdict.QUESTIONS for level in verdict.WORST_FIRST}


METRICS: dict[str, Any] = {
    "balanced_accuracy": 0.684,
    "balanced_accuracy_ci95": [0.598, 0.781],
    "auc_macro_ovr": 0.9,
    "malignant": {"sensitivity": 0.8},
    "calibrated": {
        "referral": {"sensitivity": 0.94, "sensitivity_ci95": [0.9, 1.0], "specificity": 0.75, "benign": 116}
    },
}


def test_a_line_has_the_worst_findings_and_the_section_that_made_them() -> None:
    sections = [
        Section("summary", "Metrics", [], findings=leak(0.0)),
        Section(
            "audit", "Data audit", [], findings=[Finding("FAIL", "leak", "copies"), Finding("PASS", "leak", "fine")]
        ),
        Section("shap", "SHAP", [], findings=flags(43.0)),
    ]
    lines = {line.question: line for line in make_verdict(METRICS, 6, sections).lines}
    assert list(lines) == list(verdict.QUESTIONS)
    assert lines["leak"][1:] == ("FAIL", "Copies.", "audit")
    assert lines["shortcut"].key == "shap"
    assert "43 points against 7 of age" in lines["shortcut"].text
    assert lines["subgroups"][1:] == ("", "", "")


def test_the_results_are_those_of_the_metrics() -> None:
    accuracy, _, referred = make_verdict(METRICS, 6, []).results
    assert accuracy[1:] == ("0.684", "[0.60, 0.78]", "chance 0.167")
    assert referred[1:] == ("94%", "[90%, 100%]", "and 25% of benign images")
    without = {key: value for key, value in METRICS.items() if key != "calibrated"}
    assert make_verdict(without, 6, []).results[2].value == "0.800"
