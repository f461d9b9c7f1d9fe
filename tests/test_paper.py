"""The whole paper by one command: runs that are shared, verdicts, and the page."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from typer.testing import CliRunner

from dualrefnet.cli import app, reports  # noqa: F401 (the module registers the commands)
from dualrefnet.errors import RecipeError, RunError
from dualrefnet.evaluation.bootstrap import NAN, Difference, Estimate
from dualrefnet.files import write_yaml
from dualrefnet.report import ReportOptions
from dualrefnet.report.paper_report import write_paper_report
from dualrefnet.run import Run
from dualrefnet.suite.grid import Block, Cell, SplitCount, Suite, expand, load_suite, same_training
from dualrefnet.suite.paper import (
    PARTS,
    UNMEASURED,
    claims,
    paper_suites,
    run_paper,
    summarise,
    verdict_on_claim,
    verdict_on_number,
)
from dualrefnet.suite.results import SuiteResults, aggregate, reported
from dualrefnet.suite.runner import run_suite
from read_page import Page
from suite_folder import write_run, wrong_on


@pytest.mark.parametrize(
    ("ours", "digits", "verdict"),
    [
        (Estimate(0.844, 0.79, 0.89), 3, "within the interval"),
        (Estimate(0.8446, 0.79, 0.89), 3, "reproduced"),
        (Estimate(0.8449, 0.79, 0.8449), 2, "reproduced"),
        (Estimate(0.80, 0.75, 0.84), 3, "contradicted"),
        (Estimate(0.80, 0.75, 0.845), 3, "within the interval"),
        (Estimate(0.80), 3, "contradicted"),
        (Estimate(NAN), 3, UNMEASURED),
    ],
)
def test_a_number_is_reproduced_when_rounded_or_lies_in_the_interval(ours: Estimate, digits: int, verdict: str) -> None:
    assert verdict_on_number(0.845 if digits == 3 else 0.84, ours, digits) == verdict


@pytest.mark.parametrize(
    ("claimed", "low", "high", "verdict"),
    [
        (0.013, 0.001, 0.03, "reproduced"),
        (0.013, -0.01, 0.03, "within the interval"),
        (0.09, -0.01, 0.03, "contradicted"),
        (NAN, -0.01, 0.03, "within the interval"),
        (NAN, -0.03, -0.01, "contradicted"),
        (0.013, NAN, NAN, UNMEASURED),
    ],
)
def test_a_claim_needs_its_direction_and_its_size(claimed: float, low: float, high: float, verdict: str) -> None:
    middle = (low + high) / 2
    assert verdict_on_claim(claimed, Difference(middle, low, high)) == verdict


def test_verdicts_are_counted() -> None:
    assert summarise([UNMEASURED, UNMEASURED]) == UNMEASURED
    counted = summarise(["reproduced", "contradicted", "reproduced", UNMEASURED])
    assert counted == "contradicted: 1, reproduced: 2 of 4"


def predictions(cell: Cell) -> NDArray[np.int64]:
    """AuxNet errs on eight images of 24, most of ACK; DualRefNet on two of BCC, and all others on six."""
    wrong: dict[str, tuple[int, ...]] = {"dualrefnet": (1, 4), "auxnet": (0, 3, 6, 9, 12, 15, 2, 5)}
    return wrong_on(*wrong.get(cell.key.method, tuple(range(6))))


def write_part(folder: Path, name: str, **block: Any) -> Path:
    """Write the folder of a shipped suite of PAD-UFES-20 with known predictions of 24 images."""
    suite = load_suite(name).model_dump(mode="json", exclude_none=True)
    suite["grid"] = [{**suite["grid"][0], **block}]
    write_yaml(folder / name / "suite.yaml", suite)
    for cell in expand(load_suite(folder / name / "suite.yaml")):
        write_run(folder / name / "runs" / cell.run, cell, predictions(cell))
    return folder / name


def as_the_paper_s(found: SuiteResults) -> SuiteResults:
    """Return results as if all runs were the paper's experiment."""
    return replace(found, members=[replace(system, departures=()) for system in found.members])


def test_claims_are_judged_by_differences_in_their_favour(tmp_path: Path) -> None:
    table3a = aggregate(write_part(tmp_path, "table3a", backbones=["vgg13"]), 400)
    table2 = aggregate(write_part(tmp_path, "table2"), 400)
    found = {claim.text: claim for claim in claims({"table3a": table3a, "table2": table2})}
    assert {claim.verdict for claim in found.values()} == {UNMEASURED}, "24 images of others aren't the paper's"
    assert found["DualRefNet is better than AuxNet"].limits
    assert found["DualRefNet is better than AuxNet"].printed == pytest.approx(0.013)
    found = {
        claim.text: claim for claim in claims({"table3a": as_the_paper_s(table3a), "table2": as_the_paper_s(table2)})
    }
    auxnet = found["DualRefNet is better than AuxNet"]
    printed = [
        reported("pad_ufes_20", "3a", method, "vgg13", "balanced_accuracy") for method in ("dualrefnet", "auxnet")
    ]
    assert all(printed)
    assert auxnet.printed == pytest.approx(printed[0].value - printed[1].value) == pytest.approx(0.013)
    # Balanced accuracies (1 + 6/8 + 1) / 3 and (2/8 + 1 + 6/8) / 3.
    assert auxnet.ours.value == pytest.approx(22 / 24 - 16 / 24)
    assert auxnet.ours.low < auxnet.ours.value < auxnet.ours.high
    assert auxnet.verdict == ("reproduced" if auxnet.ours.low > 0 else "within the interval")
    # There is no SCC among the three classes; of the others BCC loses most, 6/8 against 8/8.
    assert found["R raises the sensitivity to SCC (.50 to .59)"].verdict == UNMEASURED
    lost = found["R lowers the sensitivity to no other class (most for BCC)"]
    assert lost.ours.value == pytest.approx(-2 / 8)
    assert lost.verdict == ("contradicted" if lost.ours.high < 0 else "within the interval")


def test_the_page_lays_the_tables_out_as_printed(tmp_path: Path) -> None:
    write_part(tmp_path, "table3a", backbones=["vgg13"])
    write_part(tmp_path, "table2")
    write_part(tmp_path, "figure7", backbones=["vgg13", "swin_b"])
    page = write_paper_report(tmp_path, ReportOptions(photographs=False), 100)
    assert page == tmp_path / "paper.html"
    found = Page(page)
    assert {"summary", "claims", "table2", "table3a", "figure7", "confusion_matrix"} <= found.sections.keys()
    assert "table4" not in found.sections
    # Twenty-two of 24 images are right, and the paper has .851 and .845.
    rows = found.table("ACC, BACC and AUC by encoder")
    assert rows["head"] == ["", "VGG-13", "ResNet-50", "EfficientNet-B4", "MobileNet-V2", "DenseNet-121"]
    accuracy = rows["DualRefNet, ACC"]
    assert accuracy[0].startswith("0.917")
    assert "paper 0.851" in accuracy[0]
    assert [cell.split()[0] for cell in accuracy[1:]] == ["–"] * 4
    # Classes are columns; MEL, the third of the six, is one of ours and SCC isn't.
    rows = found.table("Table 2a: PAD-UFES-20, VGG-13")
    assert rows["class-wise accuracy"][2].startswith("1.00")
    assert "paper 0.89" in rows["class-wise accuracy"][2]
    assert rows["precision"][0] == rows["PPV"][0]
    assert rows["sensitivity"][4].startswith("–")
    names = {path.name for path in (tmp_path / "pictures").glob("*.png")}
    assert {"figure7_systems_balanced_accuracy.png", "figure7_ablation_balanced_accuracy.png"} <= names
    with pytest.raises(RunError, match="holds no suite of the paper"):
        write_paper_report(tmp_path / "table2")


def test_a_run_of_an_equal_recipe_is_taken_over_and_not_trained_again(tiny_run: Run, tmp_path: Path) -> None:
    recipe = tiny_run.recipe.model_dump(mode="json", exclude_unset=True)
    suite = Suite(name="s", title="S", grid=[Block(recipe=recipe)])
    (cell,) = expand(suite)
    outcome = run_suite(suite, tmp_path / "out", elsewhere={same_training(tiny_run.recipe): tiny_run.path})
    assert (outcome.total, outcome.skipped, outcome.finished) == (1, 1, [])
    copy = tmp_path / "out" / "runs" / cell.run
    assert {path.name for path in copy.iterdir()} == {path.name for path in tiny_run.path.iterdir()}
    assert (copy / "model.safetensors").samefile(tiny_run.weights_file)
    assert [path.name for path in copy.parent.iterdir()] == [cell.run]


def test_a_part_without_data_fails_alone(sample_root: Path, tmp_path: Path) -> None:
    missing, there = (
        Suite(
            name=name,
            title=name,
            splits=[SplitCount(dataset="sample", protocol="grouped", set={"data.root": str(root)})],
        )
        for name, root in (("table1", tmp_path / "nowhere"), ("table2", sample_root))
    )
    outcomes = run_paper({"table1": missing, "table2": there}, tmp_path / "out")
    assert [len(outcome.failed) for outcome in outcomes.values()] == [1, 0]
    assert (tmp_path / "out" / "table2" / "splits" / "sample-grouped.csv").is_file()


def test_the_plan_counts_every_run_once_and_an_unknown_part_is_refused(tmp_path: Path) -> None:
    suites, _ = paper_suites([], {}, False, tmp_path)
    assert tuple(suites) == PARTS
    result = CliRunner().invoke(
        app, ["paper", "--dry-run", "--smoke", "--only", "table1,table2", "--out", str(tmp_path)]
    )
    assert result.exit_code == 0, result.output
    lines = {line.split()[0]: line.split() for line in result.output.splitlines() if line.strip()}
    assert lines["table1"][-4:-2] == ["0", "0"]
    assert lines["table2"][-4:-2] == lines["all"][-4:-2] == ["2", "0"]
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(RecipeError, match="no part is called 'table3'"):
        paper_suites(["table3"], {}, False, tmp_path)


@pytest.mark.slow
def test_a_smoke_test_of_two_parts_shares_runs_and_ends_with_the_page(tmp_path: Path) -> None:
    command = ["paper", "--smoke", "--only", "table2,table4", "--out", str(tmp_path / "out"), "training.device=cpu"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    runs = [
        tmp_path / "out" / part / "runs" / "sample-dualrefnet-mobilenet_v2-fold0-seed0" for part in ("table2", "table4")
    ]
    assert runs[0].joinpath("predictions.csv").samefile(runs[1] / "predictions.csv")
    found = Page(tmp_path / "out" / "paper.html")
    assert {"summary", "table2", "table4", "figure_4b", "grad-cam", "figure_6"} <= found.sections.keys()
