from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score, roc_auc_score

from dualrefnet.analysis.evaluate import evaluate_run
from dualrefnet.errors import RunError
from dualrefnet.run import Run


def test_metrics_are_those_of_the_predictions(tiny_run: Run) -> None:
    metrics, rows = tiny_run.metrics, tiny_run.predictions.query("split == 'test'")
    classes = tiny_run.model["classes"]
    probabilities = rows[[f"prob_{name}" for name in classes]].to_numpy()
    assert metrics["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(rows["label"], rows["predicted"]))
    truth = rows["label"].map({name: index for index, name in enumerate(classes)})
    assert metrics["auc_macro_ovr"] == pytest.approx(roc_auc_score(truth, probabilities, multi_class="ovr"), abs=1e-6)
    assert (np.array(classes)[probabilities.argmax(axis=1)] == rows["predicted"]).all()
    assert np.sum(metrics["confusion_matrix"]) == len(rows)


def test_every_measure_has_an_interval_and_nothing_leaks(tiny_run: Run) -> None:
    metrics = tiny_run.metrics
    for key in ("accuracy", "balanced_accuracy", "auc_macro_ovr", "f1_macro", "precision_macro", "kappa", "ece"):
        low, high = metrics[f"{key}_ci95"]
        assert low <= metrics[key] <= high
    assert set(metrics["per_class"]) == set(tiny_run.model["classes"])
    assert metrics["validation"]["support"] + metrics["support"] == len(tiny_run.predictions)
    assert (metrics["protocol"], metrics["leakage"]["patient"]["train"]) == ("grouped", 0)


def test_data_that_have_gone_are_named(tiny_run: Run, tmp_path: Path) -> None:
    from dualrefnet.data.synthetic import make_synthetic

    other = make_synthetic(tmp_path / "other", images=60, seed=9, side=64)
    with pytest.raises(RunError, match="--root"):
        evaluate_run(tiny_run, root=other)
