"""Pictures of what a run's predictions and its training were: their numbers, their words, and that nothing is cut off."""

from typing import Any

import numpy as np
import pandas as pd
import pytest
from numpy.typing import NDArray

from dualrefnet.display.figure import PAPER, PRIMARY, ReportFigure
from dualrefnet.evaluation.bootstrap import bootstrap_intervals, with_intervals
from dualrefnet.evaluation.curves import (
    class_curves,
    compute_reliability,
    draw_precision_recall,
    draw_reliability,
    draw_roc,
)
from dualrefnet.evaluation.metrics import compute_metrics, metrics_from_confusion
from dualrefnet.report.performance import draw_confusion, draw_history, selected_epoch
from dualrefnet.run import Run
from readable import assert_readable

NAMES = ["MEL", "NV", "background_father = BRAZIL", "AK", "seborrhoeic keratosis", "DF", "melanoma, invasive", "VASC"]


def predictions(seed: int, images: int, count: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    generator = np.random.default_rng(seed)
    labels = generator.integers(count, size=images)
    scores = generator.dirichlet(np.ones(count), size=images)
    scores[np.arange(images), labels] += 0.3
    return labels, scores / scores.sum(axis=1, keepdims=True)


def pictures(
    labels: NDArray[np.int64], scores: NDArray[np.float64], classes: list[str], malignant: list[str]
) -> list[ReportFigure]:
    groups = np.arange(len(labels)) // 2
    metrics = compute_metrics(labels, scores, classes, malignant)
    curves = class_curves(labels, scores, groups, classes, malignant, samples=20)
    return [
        draw_confusion(metrics, malignant=malignant),
        draw_confusion(metrics, shares=True, malignant=malignant),
        draw_roc(curves),
        draw_precision_recall(curves),
        draw_reliability(compute_reliability(labels, scores, groups, samples=20)),
    ]


@pytest.mark.parametrize("count", [2, 3, 6, 8])
def test_every_picture_is_readable_with_two_to_eight_classes(count: int) -> None:
    labels, scores = predictions(count, 400, count)
    drawn = pictures(labels, scores, NAMES[:count], NAMES[:1])
    assert [picture.name for picture in drawn] == [
        "confusion_counts",
        "confusion_shares",
        "roc",
        "precision_recall",
        "reliability",
    ]
    for picture in drawn:
        assert_readable(picture)
        assert len(picture.data)


@pytest.mark.parametrize("labels", [[0, 1], [0, 0, 0, 0], [1, 0, 1]])
def test_every_picture_can_be_drawn_of_a_tiny_test_set_with_absent_classes(labels: list[int]) -> None:
    scores = np.tile([0.5, 0.3, 0.2, 0.0], (len(labels), 1))
    groups = [f"p{number}" for number in range(len(labels))]
    curves = class_curves(labels, scores, groups, list("ABCD"), ["D"], samples=5)
    metrics = compute_metrics(labels, scores, list("ABCD"), ["D"])
    drawn = [
        draw_confusion(metrics),
        draw_confusion(metrics, shares=True),
        draw_roc(curves),
        draw_precision_recall(curves),
    ]
    for picture in [*drawn, draw_reliability(compute_reliability(labels, scores, groups, samples=5))]:
        assert_readable(picture)


def test_the_confusion_matrices_hold_the_counts_and_shares_of_each_true_class() -> None:
    matrix = [[8, 2, 0], [1, 3, 0], [0, 0, 0]]
    metrics = metrics_from_confusion(matrix, ["MEL", "NV", "DF"], ["MEL"])
    counts, shares = draw_confusion(metrics, malignant=["MEL"]), draw_confusion(metrics, shares=True, malignant=["MEL"])
    assert (counts.name, shares.name) == ("confusion_counts", "confusion_shares")
    assert counts.data.equals(shares.data)
    assert counts.data["images"].tolist() == np.ravel(matrix).tolist()
    cell = counts.data.set_index(["true", "predicted"])
    assert cell.loc[("MEL", "NV"), "share"] == pytest.approx(0.2)
    assert cell.loc[("NV", "MEL"), "share"] == pytest.approx(0.25)
    sums = counts.data.groupby("true")["share"].sum(min_count=1)
    assert sums[["MEL", "NV"]].to_numpy() == pytest.approx([1, 1])
    assert np.isnan(sums["DF"])
    written = [text.get_text() for text in shares.figure.axes[0].texts]
    assert written == ["0.80", "0.20", "0.00", "0.25", "0.75", "0.00", "–", "–", "–"]
    assert [text.get_text() for text in counts.figure.axes[0].texts] == list("820130000")
    assert [label.get_text() for label in counts.figure.axes[0].get_yticklabels()] == ["MEL (10)", "NV (4)", "DF (0)"]
    # The first row, the truth MEL, is on top.
    assert counts.figure.axes[0].yaxis_inverted()
    assert "Malignant: MEL." in counts.caption
    assert "No test image: DF. Never predicted: DF." in counts.caption
    assert "MEL: 8 of 10 correct, most often taken for NV (2)" in counts.alt


def test_numbers_in_the_matrix_contrast_with_their_cell_in_both_themes() -> None:
    metrics = metrics_from_confusion([[100, 0], [50, 50]], ["A", "B"])
    texts = draw_confusion(metrics).figure.axes[0].texts
    assert [text.get_color() for text in texts] == ["#ffffff", "#000000", "#000000", "#000000"]


def test_the_caption_of_the_matrix_counts_the_patients_if_there_was_a_bootstrap() -> None:
    labels, scores = predictions(0, 40, 3)
    metrics = compute_metrics(labels, scores, list("ABC"))
    assert draw_confusion(metrics).caption.startswith("40 test images. ")
    drawn = with_intervals(metrics, bootstrap_intervals(labels, scores, np.arange(40) // 2, list("ABC"), samples=5))
    assert draw_confusion(drawn, unit="lesions").caption.startswith("40 test images of 20 lesions. ")


def test_roc_and_precision_recall_draw_the_numbers_of_their_tables() -> None:
    labels, scores = predictions(1, 200, 4)
    classes = ["A", "B", "C", "D"]
    curves = class_curves(labels, scores, np.arange(200) // 2, classes, ["B", "C"], samples=40, seed=7)
    for picture, kind, area in (
        (draw_roc(curves), "roc", "AUC"),
        (draw_precision_recall(curves), "precision_recall", "AP"),
    ):
        whole = curves.frame()
        expected = whole[whole["curve"] == kind].reset_index(drop=True)
        assert picture.data.equals(expected)
        assert len(picture.figure.axes) == 5
        for axis, one in zip(picture.figure.axes, curves.of, strict=True):
            part = expected[expected["class"] == one.name].set_index("part")
            chance, curve, decision = axis.lines
            assert curve.get_ydata() == pytest.approx(part.loc["curve", "y"].to_numpy())
            assert (decision.get_xdata()[0], decision.get_ydata()[0]) == tuple(part.loc["decision", ["x", "y"]])
            assert chance.get_ydata() == pytest.approx([0, 1] if kind == "roc" else [one.prevalence] * 2)
            value, low, high = part.loc["area", ["y", "low", "high"]]
            words = f"{area} {value:.2f} [{low:.2f}, {high:.2f}]"
            assert [text.get_text() for text in axis.texts] == [words]
            assert f"{one.name}: {words}" in picture.alt
            # The band covers the curve's own bounds and nothing beyond.
            corners = axis.collections[0].get_paths()[0].vertices
            assert (corners[:, 1].min(), corners[:, 1].max()) == pytest.approx(
                (part.loc["curve", "low"].min(), part.loc["curve", "high"].max())
            )
        assert (
            "200 test images of 100 patients; bands and brackets hold 95% of 40 resamples of the patients (seed 7)"
            in picture.caption
        )
        assert '"all malignant" adds up B, C' in picture.caption
    assert draw_precision_recall(curves).figure.axes[0].lines[1].get_drawstyle() == "steps-pre"


def test_a_class_without_a_curve_is_named_and_has_no_panel() -> None:
    labels, scores = predictions(2, 60, 3)
    curves = class_curves(
        labels, np.hstack([scores, np.zeros((60, 1))]), np.arange(60), ["A", "B", "C", "none"], samples=5
    )
    for picture in (draw_roc(curves), draw_precision_recall(curves)):
        assert len(picture.figure.axes) == 3
        assert "no image of none in the test set" in picture.caption
        assert "no image of none in the test set" in picture.alt


def test_a_class_that_is_never_predicted_has_no_dot_of_precision() -> None:
    scores = np.array([[0.9, 0.1], [0.6, 0.4], [0.7, 0.3], [0.8, 0.2]])
    curves = class_curves([0, 1, 0, 1], scores, np.arange(4), ["A", "B"], samples=5)
    picture = draw_precision_recall(curves)
    assert np.isnan(picture.figure.axes[1].lines[2].get_ydata()[0])
    assert "B: AP" in picture.alt
    assert "never predicted" in picture.alt


def test_the_reliability_diagram_shows_which_bins_hold_few_images() -> None:
    # 20 images at .9 of which 15 are right, 4 at .6 of which 1 is.
    scores = np.array([[0.1, 0.9]] * 20 + [[0.4, 0.6]] * 4)
    labels = np.array([1] * 15 + [0] * 5 + [1] + [0] * 3)
    result = compute_reliability(labels, scores, np.arange(24), bins=10, samples=100)
    picture = draw_reliability(result)
    upper, lower = picture.figure.axes
    assert picture.data.equals(result.table)
    assert picture.data["count"].sum() == 24
    line, many, few = (
        upper.lines[0],
        *(one for one in upper.lines if str(one.get_label()).endswith(("more", "fewer than 10 images"))),
    )
    assert line.get_xdata() == pytest.approx([0, 1])
    assert (many.get_xdata(), many.get_ydata()) == (pytest.approx([0.9]), pytest.approx([0.75]))
    assert (few.get_xdata(), few.get_ydata()) == (pytest.approx([0.6]), pytest.approx([0.25]))
    assert (many.get_markerfacecolor(), few.get_markerfacecolor()) == (PRIMARY, PAPER)
    assert few.get_markersize() < many.get_markersize()
    bars = [bar.get_segments()[0][:, 1].tolist() for bar in upper.collections]
    bounds = result.table.set_index("count")[["accuracy_low", "accuracy_high"]]
    assert bars == [pytest.approx(bounds.loc[20].tolist()), pytest.approx(bounds.loc[4].tolist())]
    assert [patch.get_height() for patch in lower.patches] == picture.data["count"].tolist()
    # 20/24 |.75 - .9| + 4/24 |.25 - .6|.
    assert "0.183" in picture.alt
    assert "confidence 0.90: 0.75 of 20 right" in picture.alt


def history(**more: list[float]) -> pd.DataFrame:
    columns = {
        "epoch": [1, 2, 3, 4],
        "learning_rate": [0.1] * 4,
        "train_classification": [1.0, 0.8, 0.6, 0.5],
        "train_total": [1.5, 1.2, 1.0, 0.9],
        "val_loss": [0.9, 0.7, 0.75, 0.6],
        "val_accuracy": [0.5, 0.7, 0.7, 0.6],
        "val_spread": [0.1] * 4,
        "val_balanced_accuracy": [0.4, 0.6, 0.6, 0.5],
        "seconds": [1.0] * 4,
    }
    return pd.DataFrame(columns | more)


def test_the_selected_epoch_is_the_best_and_a_tie_goes_to_the_lower_loss_then_to_the_earlier() -> None:
    table = history()
    assert selected_epoch(table, "balanced_accuracy") == 2
    assert selected_epoch(table, "accuracy") == 2
    assert selected_epoch(table, "loss") == 4
    assert selected_epoch(history(val_loss=[0.9, 0.8, 0.7, 0.6]), "balanced_accuracy") == 3
    assert selected_epoch(history(val_loss=[0.7] * 4), "balanced_accuracy") == 2
    assert selected_epoch(history(val_loss=[0.7] * 4), "loss") == 1
    with pytest.raises(ValueError, match="no column val_f1"):
        selected_epoch(table, "f1")


def test_the_selected_epoch_is_the_one_whose_model_was_kept(tiny_run: Run) -> None:
    table, run = tiny_run.history, tiny_run
    epoch = selected_epoch(table, run.recipe.training.selection)
    row = table.set_index("epoch").loc[epoch]
    # The kept parameters give the validation measures of that epoch.
    assert row["val_balanced_accuracy"] == pytest.approx(run.metrics["validation"]["balanced_accuracy"], abs=1e-6)
    picture = draw_history(table, epoch)
    assert_readable(picture)
    kept = picture.data[picture.data["kept"] & (picture.data["panel"] == "balanced accuracy")]
    assert kept["value"].tolist() == pytest.approx([row["val_balanced_accuracy"]])


def panels(picture: ReportFigure) -> list[str]:
    return list(dict.fromkeys(picture.data["panel"]))


def test_the_history_draws_what_the_method_has() -> None:
    full: dict[str, Any] = {
        "train_reconstruction": [0.4, 0.3, 0.2, 0.1],
        "train_penalty": [0.1] * 4,
        "l1_hidden": [200.0, 150.0, 100.0, 50.0],
        "l1_classifier": [10.0, 11.0, 12.0, 13.0],
        "val_psnr": [20.0] * 4,
    }
    picture = draw_history(history(**full), 2)
    assert_readable(picture)
    assert panels(picture) == [
        "classification loss",
        "balanced accuracy",
        "total loss",
        "reconstruction loss",
        "weight penalty",
        "relative L1 norm",
    ]
    values = {key: part["value"].tolist() for key, part in picture.data.groupby(["panel", "series"])}
    assert values["relative L1 norm", "hidden"] == [1, 0.75, 0.5, 0.25]
    assert values["relative L1 norm", "classifier"] == pytest.approx([1, 1.1, 1.2, 1.3])
    assert values["classification loss", "training"] == [1.0, 0.8, 0.6, 0.5]
    assert values["classification loss", "validation"] == [0.9, 0.7, 0.75, 0.6]
    assert values["balanced accuracy", "validation"] == [0.4, 0.6, 0.6, 0.5]
    assert picture.data.loc[picture.data["kept"], "epoch"].unique().tolist() == [2]
    dot = picture.figure.axes[1].lines[1]
    assert (dot.get_xdata()[0], dot.get_ydata()[0]) == (2, 0.6)
    assert "epoch 2" in picture.caption
    assert "kept is epoch 2 with a balanced accuracy of 0.600" in picture.alt

    plain = draw_history(history(), 2)
    assert panels(plain) == ["classification loss", "balanced accuracy"]
    assert "L1" not in plain.caption
    heads = draw_history(history(train_classification_image=[2.0] * 4, train_classification_metadata=[3.0] * 4), 4)
    assert_readable(heads)
    assert panels(heads) == ["classification loss", "balanced accuracy", "loss of auxiliary heads", "total loss"]
    assert set(heads.data.loc[heads.data["panel"] == "loss of auxiliary heads", "series"]) == {"image", "metadata"}


def test_the_history_of_a_single_epoch_can_be_drawn_and_an_unknown_epoch_is_refused() -> None:
    picture = draw_history(history().head(1), 1)
    assert_readable(picture)
    assert picture.caption.startswith("1 epoch;")
    with pytest.raises(ValueError, match="no epoch 5"):
        draw_history(history(), 5)
