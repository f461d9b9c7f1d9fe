"""Figures of confusion matrices and of the training history."""

from typing import Any

import numpy as np
import pandas as pd
import pytest

from dualrefnet.evaluation.metrics import metrics_from_confusion
from dualrefnet.report.performance import draw_confusion, draw_history, selected_epoch
from readable import assert_readable

NAMES = ["MEL", "NV", "background_father = BRAZIL", "AK", "seborrhoeic keratosis", "DF", "melanoma, invasive", "VASC"]


def test_the_confusion_matrix_holds_the_counts_and_shares_of_each_true_class() -> None:
    matrix = [[8, 2, 0], [1, 3, 0], [0, 0, 0]]
    metrics = metrics_from_confusion(matrix, ["MEL", "NV", "DF"], ["MEL"])
    counts = draw_confusion(metrics, malignant=["MEL"])
    assert counts.data["images"].tolist() == np.ravel(matrix).tolist()
    cell = counts.data.set_index(["true", "predicted"])
    assert cell.loc[("MEL", "NV"), "share"] == pytest.approx(0.2)
    assert cell.loc[("NV", "MEL"), "share"] == pytest.approx(0.25)
    sums = counts.data.groupby("true")["share"].sum(min_count=1)
    assert sums[["MEL", "NV"]].to_numpy() == pytest.approx([1, 1])
    assert np.isnan(sums["DF"])
    written = [text.get_text() for text in counts.figure.axes[0].texts]
    assert written == ["8\n80%", "2\n20%", "0", "1\n25%", "3\n75%", "0", "0", "0", "0"]
    eight = metrics_from_confusion((10_000 * np.eye(8, dtype=int) + 1).tolist(), NAMES)
    assert_readable(draw_confusion(eight))


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


def test_the_history_draws_what_the_method_has() -> None:
    full: dict[str, Any] = {
        "train_reconstruction": [0.4, 0.3, 0.2, 0.1],
        "train_penalty": [0.1] * 4,
        "l1_hidden": [200.0, 150.0, 100.0, 50.0],
        "l1_classifier": [10.0, 11.0, 12.0, 13.0],
        "val_psnr": [20.0] * 4,
    }
    figure = draw_history(history(**full), 2)
    assert_readable(figure)
    values = {key: part["value"].tolist() for key, part in figure.data.groupby(["panel", "series"], sort=False)}
    assert values["relative L1 norm", "hidden"] == [1, 0.75, 0.5, 0.25]
    assert values["relative L1 norm", "classifier"] == pytest.approx([1, 1.1, 1.2, 1.3])
    assert values["classification loss", "training"] == [1.0, 0.8, 0.6, 0.5]
    assert values["classification loss", "validation"] == [0.9, 0.7, 0.75, 0.6]
    assert values["balanced accuracy", "validation"] == [0.4, 0.6, 0.6, 0.5]
    assert {"total loss", "reconstruction loss", "weight penalty"} <= set(figure.data["panel"])
    assert figure.data.loc[figure.data["kept"], "epoch"].unique().tolist() == [2]

    plain = draw_history(history(), 2)
    assert set(plain.data["panel"]) == {"classification loss", "balanced accuracy"}
    heads = draw_history(history(train_classification_image=[2.0] * 4, train_classification_metadata=[3.0] * 4), 4)
    assert_readable(heads)
    assert set(heads.data.loc[heads.data["panel"] == "loss of auxiliary heads", "series"]) == {"image", "metadata"}
