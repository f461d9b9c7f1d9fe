import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from dualrefnet.display.figure import PAPER
from dualrefnet.errors import RunError
from dualrefnet.report.suite_figures import draw_ablation, draw_systems
from dualrefnet.suite.results import SuiteResults, aggregate


def system(label: str, **values: object) -> dict[str, object]:
    """Return a row of `SuiteResults.systems`."""
    method, backbone, variant = [*label.split("/"), "", ""][:3]
    return {
        "dataset": "pad_ufes_20",
        "protocol": "paper",
        "method": method,
        "backbone": backbone or "vgg13",
        "variant": variant,
        "measure": "accuracy",
        **{"pooled": 0.7, "low": 0.65, "high": 0.74, "runs": 1, "planned": 1, "images": 383, "groups": 320},
        **{"unit": "patient", "paper": np.nan, "paper_average": "", "difference": np.nan, "flags": (), **values},
    }


def comparison(label: str, **values: object) -> dict[str, object]:
    """Return a row of `SuiteResults.comparisons`."""
    key = {name: system(label)[name] for name in ("dataset", "protocol", "method", "backbone", "variant")}
    numbers = {"difference": -0.1, "low": -0.15, "high": -0.04, "p": 0.01, "p_holm": 0.03, "note": ""}
    return {**key, "reference": "dualrefnet vgg13", "measure": "accuracy", **numbers, **values}


def compared(*rows: dict[str, object]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=list(comparison("x")))


def labels(axis: Axes) -> list[str]:
    return [text.get_text() for text in axis.get_yticklabels()]


def marks(axis: Axes) -> list[float]:
    """Return the values of the systems' marks, from the top."""
    dots = [line for line in axis.lines if line.get_marker() in ("o", "s", "^", "v")]
    return [float(line.get_xdata()[0]) for line in sorted(dots, key=lambda line: line.get_ydata()[0])]


def intervals(axis: Axes) -> list[list[float]]:
    lines = [line for line in axis.lines if line.get_marker() == "None" and len(set(line.get_ydata())) == 1]
    return [[float(end) for end in line.get_xdata()] for line in sorted(lines, key=lambda line: line.get_ydata()[0])]


def hatched(axis: Axes) -> list[float]:
    patches = [patch for patch in axis.patches if isinstance(patch, Rectangle) and patch.get_hatch()]
    return sorted(patch.get_y() + patch.get_height() / 2 for patch in patches)


def test_values_and_intervals_are_those_of_the_table(small_results: SuiteResults) -> None:
    systems, comparisons = small_results.systems, small_results.comparisons
    figure = draw_systems(systems, comparisons, "balanced_accuracy")
    (axis,) = figure.figure.axes
    rows = systems[systems["measure"] == "balanced_accuracy"]
    assert labels(axis) == ["DualRefNet", "Concat"]
    assert marks(axis) == rows["pooled"].tolist()
    assert intervals(axis) == rows[["low", "high"]].to_numpy().tolist()
    assert hatched(axis) == []
    columns = ["pooled", "low", "high"]
    assert figure.data[columns].to_numpy().tolist() == rows[columns].to_numpy().tolist()
    assert figure.data["is_reference"].tolist() == [True, False]
    (axis,) = draw_ablation(systems, comparisons, "accuracy").figure.axes
    rows = comparisons[comparisons["measure"] == "accuracy"]
    assert labels(axis) == ["Concat"]
    assert marks(axis) == rows["difference"].tolist() == [pytest.approx((37 - 46) / 48)]
    assert intervals(axis) == rows[["low", "high"]].to_numpy().tolist()


def test_unfinished_systems_are_hatched_and_those_without_a_value_named(small: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(small, tmp_path / "suite")
    shutil.rmtree(folder / "runs" / "sample-concat-efficientnet_lite0-fold1-seed1")
    found = aggregate(folder, 100)
    figure = draw_systems(found.systems, found.comparisons, "accuracy")
    (axis,) = figure.figure.axes
    assert hatched(axis) == pytest.approx([axis.get_yticks()[1]])
    assert "Concat: 3 of 4" in figure.caption
    for run in (folder / "runs").glob("sample-concat-*"):
        shutil.rmtree(run)
    found = aggregate(folder, 100)
    figure = draw_systems(found.systems, found.comparisons, "accuracy")
    assert labels(figure.figure.axes[0]) == ["DualRefNet"]
    assert "Concat" in figure.caption
    with pytest.raises(RunError, match="no system of the suite is compared"):
        draw_ablation(found.systems, found.comparisons, "accuracy")


def test_filled_marks_differ_after_correction_and_less_may_be_better() -> None:
    systems = pd.DataFrame([system(name, measure="ece") for name in ("dualrefnet", "concat", "metanet", "visual")])
    missing = dict.fromkeys(("difference", "low", "high", "p", "p_holm"), np.nan)
    comparisons = compared(
        comparison("concat", measure="ece"),
        comparison("metanet", measure="ece", difference=0.02, low=-0.01, high=0.05, p=0.2, p_holm=0.2),
        comparison("visual", measure="ece", **missing),
    )
    figure = draw_ablation(systems, comparisons, "ece")
    (axis,) = figure.figure.axes
    assert [line.get_markerfacecolor() == PAPER for line in axis.lines if line.get_marker() == "o"] == [False, True]
    assert axis.get_xlabel().index("better") < axis.get_xlabel().index("worse")
    assert figure.caption.endswith("Not compared: Visual.")
    with pytest.raises(RunError, match="doesn't measure kappa; it measures: ece"):
        draw_systems(systems, comparisons, "kappa")


def test_backbones_are_panels_and_tiers_are_marks_in_a_line() -> None:
    backbones, methods = ("vgg13", "efficientnet_lite0+efficientnet_lite1"), ("concat", "dualrefnet")
    names = [f"{method}/{backbone}/{tier}" for backbone in backbones for method in methods for tier in ("M1", "M3")]
    rows = [system(name, pooled=0.5 + 0.01 * place) for place, name in enumerate(names)]
    rows += [system("metadata_only/vgg13/M1"), system("metadata_only/vgg13/M3", planned=2)]
    axes = draw_systems(pd.DataFrame(rows), compared(), "accuracy").figure.axes
    titles = ["VGG-13", "EfficientNet-Lite0 + EfficientNet-Lite1", "no image encoder"]
    assert [axis.get_title(loc="left") for axis in axes] == titles
    assert [labels(axis) for axis in axes] == [["Concat", "DualRefNet"]] * 2 + [["Metadata only"]]
    assert marks(axes[1]) == pytest.approx([0.54, 0.55, 0.56, 0.57])
    # Only M3's half of the line.
    assert hatched(axes[2]) == pytest.approx([axes[2].get_yticks()[0] + 0.5])
