import copy
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import balanced_accuracy_score, roc_auc_score

from dualrefnet.analysis.audit import audit_split
from dualrefnet.analysis.evaluate import evaluate_run
from dualrefnet.analysis.missing_metadata import measure_missing_metadata
from dualrefnet.analysis.opened_run import OpenedRun, open_run
from dualrefnet.analysis.out_of_distribution import measure_out_of_distribution
from dualrefnet.analysis.perturbations import predict_with_metadata
from dualrefnet.analysis.shortcuts import probe_shortcuts
from dualrefnet.analysis.subgroups import subgroups_of_run
from dualrefnet.errors import DataError, DualRefNetError, RunError
from dualrefnet.files import write_csv
from dualrefnet.report.trust import audit_section, missing_metadata_section, shortcuts_section, subgroups_section
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


CPU = torch.device("cpu")
SMALL = {
    "one class": "label == 'NEV'",
    "nothing malignant": "label not in ['BCC', 'MEL', 'SCC']",
    "two images": "not patient_id.duplicated()",
}


def with_test_images(run: Run, folder: Path, chosen: pd.DataFrame) -> Run:
    changed = Run(shutil.copytree(run.path, folder))
    for name, table in (("split.csv", run.split), ("predictions.csv", run.predictions)):
        write_csv(folder / name, table[(table["split"] != "test") | table["image_id"].isin(chosen["image_id"])])
    return changed


@pytest.mark.parametrize("kind", SMALL)
def test_a_small_test_split_is_measured_without_intervals_that_it_can_t_have(
    kind: str, tiny_run: Run, tmp_path: Path
) -> None:
    chosen = tiny_run.split.query("split == 'test'").query(SMALL[kind]).head(2 if kind == "two images" else None)
    run = with_test_images(tiny_run, tmp_path / "run", chosen)
    assert evaluate_run(run, device=CPU)["support"] == len(chosen)
    opened = open_run(run, device=CPU)
    sections = [
        subgroups_section(subgroups_of_run(opened, 5)),
        shortcuts_section(probe_shortcuts(opened, permutations=1, samples=5)),
        missing_metadata_section(measure_missing_metadata(opened, draws=1, samples=5)),
        audit_section(audit_split(opened.dataset, opened.split, forests=False, samples=5)),
    ]
    assert all(section.intro for section in sections)


def test_a_test_split_of_one_patient_says_why_it_can_t_be_measured(tiny_run: Run, tmp_path: Path) -> None:
    run = with_test_images(tiny_run, tmp_path / "run", tiny_run.split.query("split == 'test'").head(1))
    opened = open_run(run, device=CPU)
    for measure in (probe_shortcuts, measure_missing_metadata, measure_out_of_distribution, subgroups_of_run):
        with pytest.raises(DataError, match="1 images of 1 patients"):
            measure(opened)
    with pytest.raises(DataError, match="1 images of 1 patients"):
        evaluate_run(run, device=CPU)


def test_a_model_that_computes_no_numbers_isn_t_measured(opened: OpenedRun) -> None:
    model, examples = copy.deepcopy(opened.model), opened.image_examples("test")
    for parameter in model.parameters():
        parameter.data.fill_(torch.nan)
    with pytest.raises(DualRefNetError, match="its training has diverged"):
        predict_with_metadata(replace(opened, model=model), examples, [examples.metadata])
