import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.patches import Rectangle

from dualrefnet.display.figure import PAPER, ReportFigure
from dualrefnet.errors import RunError
from dualrefnet.report.suite_figures import draw_ablation, draw_systems
from dualrefnet.suite.paper import reported
from dualrefnet.suite.results import LABEL_LEAKING, Aggregate, aggregate
from suite_folder import SUITE, changed, paper_suite, write_suite, wrong_on


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished suite; don't change it."""
    return write_suite(tmp_path_factory.mktemp("suite") / "small", SUITE)


def row(label: str, **values: object) -> dict[str, object]:
    """Return a row of `Aggregate.systems`."""
    method, backbone, variant = [*label.split("/"), "", ""][:3]
    return {
        "dataset": "pad_ufes_20",
        "protocol": "paper",
        "method": method,
        "backbone": backbone or "vgg13",
        "variant": variant,
        "measure": "accuracy",
        "pooled": 0.7,
        "low": 0.65,
        "high": 0.74,
        "mean": 0.7,
        "sd": np.nan,
        "runs": 1,
        "planned": 1,
        "folds": 1,
        "seeds": 1,
        "images": 383,
        "groups": 320,
        "paper": np.nan,
        "paper_average": "",
        "difference": np.nan,
        "encoder": "fine_tuned",
        "weights": "",
        "flags": "",
        **values,
    }


def compared(label: str, reference: str, **values: object) -> dict[str, object]:
    """Return a row of `Aggregate.comparisons`."""
    method, backbone, variant = [*label.split("/"), "", ""][:3]
    return {
        "dataset": "pad_ufes_20",
        "protocol": "paper",
        "method": method,
        "backbone": backbone or "vgg13",
        "variant": variant,
        "reference": reference,
        "measure": "accuracy",
        "difference": -0.1,
        "low": -0.15,
        "high": -0.04,
        "p": 0.01,
        "p_holm": 0.03,
        "samples": 1000,
        "note": "",
        **values,
    }


def nothing(*rows: dict[str, object]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=list(compared("x", "y")))


def panels(picture: ReportFigure) -> list[Axes]:
    return list(picture.figure.axes)


def labels(axis: Axes) -> list[str]:
    return [text.get_text() for text in axis.get_yticklabels()]


def marks(axis: Axes) -> list[float]:
    """Return where the marks of the systems stand, from the top."""
    dots = [line for line in axis.lines if line.get_marker() in ("o", "s", "^", "v")]
    return [float(line.get_xdata()[0]) for line in sorted(dots, key=lambda line: line.get_ydata()[0])]


def intervals(axis: Axes) -> list[list[float]]:
    lines = [line for line in axis.lines if line.get_marker() == "None" and len(set(line.get_ydata())) == 1]
    return [[float(end) for end in line.get_xdata()] for line in sorted(lines, key=lambda line: line.get_ydata()[0])]


def hatched(axis: Axes) -> list[float]:
    return sorted(
        patch.get_y() + patch.get_height() / 2
        for patch in axis.patches
        if isinstance(patch, Rectangle) and patch.get_hatch()
    )


def test_systems_are_drawn_with_the_values_and_intervals_of_the_table(small: Path) -> None:
    found = aggregate(small)
    picture = draw_systems(found.systems, found.comparisons, "balanced_accuracy")
    (axis,) = panels(picture)
    rows = found.systems[found.systems["measure"] == "balanced_accuracy"]
    assert labels(axis) == ["DualRefNet", "Concat"]
    assert marks(axis) == rows["pooled"].tolist()
    assert intervals(axis) == rows[["low", "high"]].to_numpy().tolist()
    assert [text.get_fontweight() for text in axis.get_yticklabels()] == ["bold", "normal"]
    assert hatched(axis) == []
    assert (
        picture.data[["pooled", "low", "high"]].to_numpy().tolist()
        == rows[["pooled", "low", "high"]].to_numpy().tolist()
    )
    assert picture.data["is_reference"].tolist() == [True, False]
    assert "48 images of 24 patients" in picture.caption
    assert "the reference, DualRefNet." in picture.caption
    dualrefnet = rows.iloc[0]
    assert f"DualRefNet {dualrefnet['pooled']:.3f} [{dualrefnet['low']:.3f}, {dualrefnet['high']:.3f}]" in picture.alt
    assert axis.get_xlabel() == "balanced accuracy\n(higher is better)"
    assert picture.name == "systems_balanced_accuracy"


def test_differences_are_those_of_the_table_with_zero_and_direction(small: Path) -> None:
    found = aggregate(small)
    picture = draw_ablation(found.systems, found.comparisons, "accuracy")
    (axis,) = panels(picture)
    compared_rows = found.comparisons[found.comparisons["measure"] == "accuracy"]
    assert labels(axis) == ["Concat"]
    assert marks(axis) == compared_rows["difference"].tolist() == [pytest.approx((37 - 46) / 48)]
    assert intervals(axis) == compared_rows[["low", "high"]].to_numpy().tolist()
    assert any(set(line.get_xdata()) == {0} for line in axis.lines)
    assert axis.get_xlabel() == "difference in accuracy\n← worse     better →"
    assert "that of the reference (DualRefNet) on the same test images (48 images of 24 patients)" in picture.caption
    assert "Right of zero: better" in picture.caption
    assert "Holm's correction for 1 comparison)" in picture.caption
    assert picture.data[["difference", "low", "high", "p_holm"]].to_numpy().tolist() == (
        compared_rows[["difference", "low", "high", "p_holm"]].to_numpy().tolist()
    )


def test_unfinished_systems_are_hatched_and_named_and_those_without_a_value_too(small: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(small, tmp_path / "suite")
    shutil.rmtree(folder / "runs" / "sample-concat-efficientnet_lite0-fold1-seed1")
    found = aggregate(folder)
    picture = draw_systems(found.systems, found.comparisons, "accuracy")
    (axis,) = panels(picture)
    assert hatched(axis) == pytest.approx([axis.get_yticks()[1]])
    assert "Hatched: only 3 of 4 runs are finished (Concat)." in picture.caption
    assert [text.get_text() for text in picture.figure.legends[0].get_texts()] == ["runs are missing"]
    for run in (folder / "runs").glob("sample-concat-*"):
        shutil.rmtree(run)
    found = aggregate(folder)
    picture = draw_systems(found.systems, found.comparisons, "accuracy")
    assert labels(panels(picture)[0]) == ["DualRefNet"]
    assert picture.caption.endswith("Without a value: Concat.")
    with pytest.raises(RunError, match="no system of the suite is compared"):
        draw_ablation(found.systems, found.comparisons, "accuracy")


def test_flags_are_told_once_with_the_systems_that_they_are_about() -> None:
    leak = "leaking split: the same patients or lesions in training and test"
    systems = pd.DataFrame(
        [
            row("dualrefnet", flags=f"{leak}; frozen encoder; 1 of 3 runs", planned=3),
            row("concat", flags=f"{LABEL_LEAKING}; {leak}; frozen encoder"),
            row("metadata_only", flags=f"{leak}; 2 of 3 runs", runs=2, planned=3),
        ]
    )
    picture = draw_systems(systems, nothing(), "accuracy")
    assert f"L{leak[1:]} (all systems)." in picture.caption
    assert "Frozen encoder (all systems that read images)." in picture.caption
    assert f"{LABEL_LEAKING} (Concat (LABEL-LEAKING IMPUTATION))." in picture.caption
    assert "Hatched: not all runs are finished (DualRefNet: 1 of 3, Metadata only: 2 of 3)." in picture.caption
    assert "of 3 runs" not in picture.caption
    assert "reference" not in picture.caption


def test_the_papers_number_is_a_hollow_mark_of_its_own(tmp_path: Path) -> None:
    found = paper_suite(tmp_path)
    picture = draw_systems(found.systems, found.comparisons, "accuracy")
    (axis,) = panels(picture)
    rows = found.systems[found.systems["measure"] == "accuracy"]
    (diamonds,) = [line for line in axis.lines if line.get_marker() == "D"]
    expected = [reported("pad_ufes_20", "3a", method, "vgg13", "accuracy") for method in ("dualrefnet", "visual")]
    assert diamonds.get_fillstyle() == "none"
    assert list(diamonds.get_xdata()) == [number.value for number in expected if number] == rows["paper"].tolist()
    assert list(diamonds.get_ydata()) == list(axis.get_yticks())
    assert "Hollow diamond" in picture.caption
    assert picture.data["paper"].tolist() == rows["paper"].tolist()
    assert f"paper {rows['paper'].iloc[0]:.3f}" in picture.alt


def test_a_number_that_is_averaged_in_another_way_is_named_and_not_drawn() -> None:
    systems = pd.DataFrame(
        [
            row("dualrefnet", measure="f1_macro", paper=0.8, paper_average="macro"),
            row("metablock", measure="f1_macro", paper=0.7, paper_average="weighted"),
        ]
    )
    picture = draw_systems(systems, nothing(), "f1_macro")
    (diamonds,) = [line for line in panels(picture)[0].lines if line.get_marker() == "D"]
    assert np.asarray(diamonds.get_xdata()) == pytest.approx([0.8, np.nan], nan_ok=True)
    assert "not drawn, is the paper's number of MetaBlock." in picture.caption
    assert picture.data["paper"].isna().tolist() == [False, True]


def test_filled_marks_differ_after_correction_and_less_may_be_better() -> None:
    systems = pd.DataFrame([row(name, measure="ece") for name in ("dualrefnet", "concat", "metanet", "visual")])
    comparisons = nothing(
        compared("concat", "dualrefnet vgg13", measure="ece"),
        compared(
            "metanet", "dualrefnet vgg13", measure="ece", difference=0.02, low=-0.01, high=0.05, p=0.2, p_holm=0.2
        ),
        compared(
            "visual",
            "dualrefnet vgg13",
            measure="ece",
            difference=np.nan,
            low=np.nan,
            high=np.nan,
            p=np.nan,
            p_holm=np.nan,
        ),
    )
    picture = draw_ablation(systems, comparisons, "ece")
    (axis,) = panels(picture)
    dots = [line for line in axis.lines if line.get_marker() == "o"]
    assert [line.get_markerfacecolor() == PAPER for line in dots] == [False, True]
    assert axis.get_xlabel().endswith("← better     worse →")
    assert "Left of zero: better" in picture.caption
    assert "for 2 comparisons" in picture.caption
    assert picture.caption.endswith("Not compared: Visual.")
    assert "MetaNet +0.020 [−0.010, +0.050], p 0.200" in picture.alt
    assert draw_systems(systems, comparisons, "ece").figure.axes[0].get_xlabel().endswith("(lower is better)")


def test_backbones_are_groups_and_tiers_are_marks_in_a_line() -> None:
    names = [
        f"{method}/{backbone}/{tier}"
        for backbone in ("vgg13", "efficientnet_lite0+efficientnet_lite1")
        for method in ("concat", "dualrefnet")
        for tier in ("M1", "M3")
    ]
    systems = pd.DataFrame([row(name, pooled=0.5 + 0.01 * place) for place, name in enumerate(names)])
    systems = pd.concat(
        [systems, pd.DataFrame([row("metadata_only/vgg13/M1"), row("metadata_only/vgg13/M3", runs=1, planned=2)])]
    )
    picture = draw_systems(systems, nothing(), "accuracy")
    assert [axis.get_title(loc="left") for axis in panels(picture)] == [
        "VGG-13",
        "EfficientNet-Lite0 + EfficientNet-Lite1",
        "no image encoder",
    ]
    assert [labels(axis) for axis in panels(picture)] == [["Concat", "DualRefNet"]] * 2 + [["Metadata only"]]
    assert marks(panels(picture)[1]) == pytest.approx([0.54, 0.55, 0.56, 0.57])
    assert [line.get_marker() for line in panels(picture)[0].lines if line.get_marker() in "os"] == ["o", "s"] * 2
    # Only M3's half of the line.
    (band,) = hatched(panels(picture)[2])
    assert band == pytest.approx(panels(picture)[2].get_yticks()[0] + 0.5)
    assert "(Metadata only M3)" in picture.caption
    assert [text.get_text() for text in picture.figure.legends[0].get_texts()] == ["M1", "M3", "runs are missing"]


def test_one_method_on_several_encoders_and_data_sets_has_a_line_for_each_encoder() -> None:
    systems = pd.DataFrame(
        [
            row("dualrefnet/vgg13"),
            row("dualrefnet/swin_b"),
            row("dualrefnet/densenet121", dataset="isic_2019"),
            row("dualrefnet/swin_b", dataset="isic_2019", images=4936, groups=2800),
        ]
    )
    picture = draw_systems(systems, nothing(), "accuracy")
    assert [labels(axis) for axis in panels(picture)] == [["VGG-13", "Swin-B"], ["DenseNet-121", "Swin-B"]]
    assert panels(picture)[1].get_title(loc="left") == "isic_2019, protocol paper, DualRefNet"
    assert "4936 images of 2800 lesions" in picture.caption
    assert "383 images of 320 patients" in picture.caption
    assert "Swin-B (isic_2019, protocol paper, DualRefNet) 0.700" in picture.alt


def test_variants_of_an_ablation_are_called_by_their_own_names(tmp_path: Path) -> None:
    variants = [
        {"name": "whole"},
        {"name": "no R", "set": {"loss.penalty": 0}},
        {"name": "Concat", "set": {"model.method": "concat"}},
    ]
    suite = changed(
        rows="variant",
        reference="whole",
        grid_methods=["dualrefnet"],
        grid_variants=variants,
        grid_folds=[0],
        grid_seeds=[0],
    )
    found: Aggregate = aggregate(write_suite(tmp_path, suite, lambda cell: wrong_on(0)))
    picture = draw_systems(found.systems, found.comparisons, "accuracy")
    assert labels(panels(picture)[0]) == ["whole", "no R", "Concat"]
    assert "the reference, whole." in picture.caption
    ablation = draw_ablation(found.systems, found.comparisons, "accuracy")
    assert labels(panels(ablation)[0]) == ["no R", "Concat"]
    assert "that of the reference (whole)" in ablation.caption


def test_an_unknown_measure_is_refused_with_those_there_are(small: Path) -> None:
    found = aggregate(small)
    for draw in (draw_systems, draw_ablation):
        with pytest.raises(RunError, match="doesn't measure kappa; it measures: accuracy, balanced_accuracy"):
            draw(found.systems, found.comparisons, "kappa")
    with pytest.raises(RunError, match="no system of the suite has a value"):
        draw_systems(pd.DataFrame([row("concat", pooled=np.nan, runs=0)]), nothing(), "accuracy")


def test_forty_systems_fit_without_touching_each_other() -> None:
    methods = ("no_metadata", "concat", "metanet", "metablock", "hmfb", "visual", "auxnet", "dualrefnet")
    backbones = ("vgg13", "resnet50", "efficientnet_b4", "mobilenet_v2", "densenet121")
    systems = pd.DataFrame(
        [
            row(f"{method}/{backbone}", flags=LABEL_LEAKING if method == "concat" else "")
            for backbone in backbones
            for method in methods
        ]
    )
    picture = draw_systems(systems, nothing(), "accuracy")
    canvas = FigureCanvasAgg(picture.figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    boxes = [text.get_window_extent(renderer) for axis in panels(picture) for text in axis.get_yticklabels()]
    assert len(boxes) == 40
    assert all(lower.y1 <= upper.y0 + 0.5 for upper, lower in pairwise(boxes))
    titles = [axis._left_title.get_window_extent(renderer) for axis in panels(picture)]  # type: ignore[attr-defined]
    assert all(
        title.y1 <= axis.get_window_extent(renderer).y0
        for title, axis in zip(titles[1:], panels(picture), strict=False)
    )
    assert all(box.x0 >= 0 for box in boxes)
