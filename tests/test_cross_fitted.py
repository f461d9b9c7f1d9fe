import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

from conftest import TINY
from dualrefnet.analysis.evaluate import evaluate_run
from dualrefnet.analysis.opened_run import OpenedRun, open_run
from dualrefnet.analysis.perturbations import predict_with_metadata, predict_without_image
from dualrefnet.cli import app
from dualrefnet.cli import runs as _runs  # noqa: F401 (registers the commands)
from dualrefnet.data.metadata import MetadataEncoder
from dualrefnet.data.protocols import FOLD, member_split
from dualrefnet.deploy.predictor import Predictor
from dualrefnet.errors import RecipeError, RunError, SplitError
from dualrefnet.evaluation.calibration import fit_temperature
from dualrefnet.evaluation.metrics import compute_metrics
from dualrefnet.files import write_csv
from dualrefnet.models.cross_fitted import CrossFitted
from dualrefnet.recipe import LossSection, Recipe, load_recipe
from dualrefnet.report.run_report import write_report
from dualrefnet.run import Run
from dualrefnet.runtime.calibration import apply_temperature
from dualrefnet.training.losses import DualRefNetLoss
from dualrefnet.training.train import taught, train_recipe
from dualrefnet.training.workers import available_cores

TOKENS = {
    "metadata.tier": "M2",
    "metadata.imputation": "token",
    "modality_dropout": {"fields": 0.3, "metadata": 0.25, "image": 0.25},
    "training.selection": "last",
    "training.epochs": 1,
}


@pytest.fixture(scope="module")
def recipe(sample_root: Path) -> Recipe:
    changed = {**TINY, **TOKENS, "data.root": str(sample_root), "data.protocol": "cross-fitted", "data.folds": 3}
    return load_recipe("sample", changed)


@pytest.fixture(scope="module")
def run(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Finished; don't change it."""
    return train_recipe(recipe, tmp_path_factory.mktemp("cross") / "run")


@pytest.fixture(scope="module")
def opened(run: Run) -> OpenedRun:
    return open_run(run, device=torch.device("cpu"))


def contents(run: Run) -> dict[str, bytes]:
    names = ("predictions.csv", "metrics.json", "calibration.json", "out_of_scope.safetensors", "model.json")
    files = {name: (run.path / name).read_bytes() for name in names}
    return files | {member.path.name: member.weights_file.read_bytes() for member in run.members}


def test_every_image_is_tested_once_by_a_member_that_has_not_seen_its_patient(run: Run) -> None:
    split, predictions = run.split, run.predictions
    assert sorted(predictions["image_id"]) == sorted(split["image_id"])
    assert predictions["image_id"].is_unique
    assert split.groupby("patient_id")[FOLD].nunique().max() == 1
    for fold, member in enumerate(run.members):
        trained = set(member.split.loc[member.split["split"] == "train", "patient_id"])
        assert trained.isdisjoint(split.loc[split[FOLD] == fold, "patient_id"])
        # All other patients are trained on.
        assert trained == set(split.loc[split[FOLD] != fold, "patient_id"])


def test_out_of_fold_predictions_are_those_of_the_members_alone(run: Run, opened: OpenedRun) -> None:
    columns = [name for name in run.predictions if name.startswith("prob_")]
    predictions = run.predictions.set_index("image_id")[columns]
    for fold, member in enumerate(run.members):
        alone = open_run(member, device=torch.device("cpu"))
        examples = alone.examples("val")
        assert set(examples.image_ids) == set(run.split.loc[run.split[FOLD] == fold, "image_id"])
        [own] = predict_with_metadata(alone, examples, [examples.metadata]).probabilities
        np.testing.assert_allclose(own, predictions.loc[list(examples.image_ids)], atol=1e-6)
        [blank] = predict_without_image(alone, examples, [examples.metadata])
        everything = opened.examples("test")
        [together] = predict_without_image(opened, everything, [everything.metadata])
        rows = pd.Index(everything.image_ids).get_indexer(pd.Index(examples.image_ids))
        np.testing.assert_allclose(blank, together[rows], atol=1e-6)


def test_metrics_are_of_all_images_and_of_each_fold(run: Run) -> None:
    predictions, metrics = run.predictions.merge(run.split[["image_id", FOLD]], on="image_id"), run.metrics
    classes = run.model["classes"]
    scores = predictions[[f"prob_{name}" for name in classes]].to_numpy()
    labels = pd.Index(classes).get_indexer(pd.Index(predictions["label"]))
    assert metrics["support"] == len(labels)
    assert metrics["balanced_accuracy"] == compute_metrics(labels, scores, classes)["balanced_accuracy"]
    for fold, value in enumerate(metrics["folds"]["accuracy"]["values"]):
        rows = (predictions[FOLD] == fold).to_numpy()
        assert value == pytest.approx((scores[rows].argmax(axis=1) == labels[rows]).mean())
    values = metrics["folds"]["accuracy"]["values"]
    assert metrics["folds"]["accuracy"]["mean"] == pytest.approx(np.mean(values))
    assert metrics["folds"]["accuracy"]["sd"] == pytest.approx(np.std(values, ddof=1))


def test_a_fold_is_measured_with_the_calibration_of_the_others(run: Run) -> None:
    predictions = run.predictions.merge(run.split[["image_id", FOLD]], on="image_id")
    classes = run.model["classes"]
    scores = predictions[[f"prob_{name}" for name in classes]].to_numpy()
    labels = pd.Index(classes).get_indexer(pd.Index(predictions["label"]))
    calibrated = np.empty_like(scores)
    for fold in range(3):
        own = (predictions[FOLD] == fold).to_numpy()
        calibrated[own] = apply_temperature(scores[own], fit_temperature(labels[~own], scores[~own]))
    expected = compute_metrics(labels, calibrated, classes)["log_loss"]
    assert run.metrics["calibrated"]["after"]["log_loss"] == pytest.approx(expected, abs=1e-6)
    # What is deployed has seen all.
    assert run.calibration.temperature == pytest.approx(fit_temperature(labels, scores), rel=1e-4)
    assert run.calibration.images == len(labels)


def test_new_cases_get_the_mean_of_the_members(run: Run, sample_root: Path) -> None:
    together, members = Predictor.load(run), [Predictor.load(member) for member in run.members]
    files = sorted((sample_root / "images").iterdir())[:5]

    def probabilities(predictor: Predictor, image: bool) -> np.ndarray:
        images = [predictor.prepare(file) if image else None for file in files]
        values = predictor.encoder.encode_records([{"age": 40 + number} for number in range(5)]).values
        return predictor._predict(images, values)[0]

    for image in (True, False):
        mean = np.mean([probabilities(member, image) for member in members], axis=0)
        np.testing.assert_allclose(probabilities(together, image), mean, atol=1e-6)
    assert together.predict(files[0]).refer is not None


def test_the_out_of_distribution_limit_is_of_images_that_the_members_have_not_seen(run: Run, opened: OpenedRun) -> None:
    score, examples = run.out_of_scope, opened.examples("test")
    assert len(score.distances) == 3
    assert examples.folds is not None
    vectors = opened.vectors(examples, np.arange(len(examples)))
    flagged = [int((score.member_score(vectors[examples.folds == fold], fold) > 1 + 1e-6).sum()) for fold in range(3)]
    assert sum(flagged) <= 0.02 * (len(examples) + 1)
    assert run.metrics["out_of_scope"]["images"] == len(examples)


def test_a_member_that_chooses_its_epoch_does_so_on_another_fold(run: Run) -> None:
    split = member_split(run.split, 1, chooses=True)
    sides = {name: set(run.split.loc[(split["split"] == name).to_numpy(), FOLD]) for name in ("train", "val", "test")}
    assert sides == {"train": {0}, "val": {2}, "test": {1}}


def test_a_patient_in_two_folds_is_refused(run: Run, tmp_path: Path) -> None:
    shutil.copytree(run.path, tmp_path / "run")
    split = run.split
    row = split.index[split[FOLD] == 0][0]
    other = split.index[split[FOLD] == 1][0]
    split.loc[other, "patient_id"] = split.loc[row, "patient_id"]
    write_csv(tmp_path / "run" / "split.csv", split)
    with pytest.raises(SplitError, match="more than one fold"):
        open_run(Run(tmp_path / "run"))


def test_evaluating_again_gives_the_same_files(run: Run, tmp_path: Path) -> None:
    shutil.copytree(run.path, tmp_path / "run")
    again = Run(tmp_path / "run")
    evaluate_run(again)
    assert contents(again) == contents(run)
    again.members[1].weights_file.write_bytes(b"damaged")
    with pytest.raises(RunError, match="checksum"):
        open_run(again)


def test_a_killed_run_ends_in_the_same_files(run: Run, recipe: Recipe, tmp_path: Path) -> None:
    file, out, threads = tmp_path / "recipe.json", tmp_path / "run", torch.get_num_threads()
    file.write_text(recipe.model_dump_json())
    code = (
        "import sys; from pathlib import Path; from dualrefnet.recipe import load_recipe;"
        f"from dualrefnet.training.train import train_recipe; import torch; torch.set_num_threads({threads});"
        "train_recipe(load_recipe(sys.argv[1]), Path(sys.argv[2]), resume=True)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(file), str(out)], stdout=subprocess.DEVNULL)
    second = out / "members" / "1" / "recipe.yaml"
    while not second.is_file():
        assert process.poll() is None
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    first = (out / "members" / "0" / "model.safetensors").stat().st_mtime_ns
    assert not (out / "metrics.json").exists()
    again = train_recipe(recipe, out, resume=True)
    # What was done is kept.
    assert (out / "members" / "0" / "model.safetensors").stat().st_mtime_ns == first
    assert contents(again) == contents(run)


@pytest.mark.slow
def test_members_trained_at_the_same_time_are_the_same(recipe: Recipe, tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, available_cores() // 2))
    try:
        alone, together = (train_recipe(recipe, tmp_path / str(jobs), jobs=jobs) for jobs in (1, 2))
    finally:
        torch.set_num_threads(threads)
    assert contents(together) == contents(alone)


def test_a_method_without_images_is_tested_by_the_right_members(recipe: Recipe, tmp_path: Path) -> None:
    alone = load_recipe(recipe, {"model.method": "metadata_only", "training.epochs": 2})
    run = train_recipe(alone, tmp_path / "run")
    columns = [name for name in run.predictions if name.startswith("prob_")]
    predictions = run.predictions.set_index("image_id")[columns]
    rows = open_run(run).rows("test").set_index("image_id", drop=False)
    for fold, member in enumerate(run.members):
        ids = run.split.loc[run.split[FOLD] == fold, "image_id"]
        own = open_run(member)
        values = torch.from_numpy(MetadataEncoder.encode(own.metadata, rows.loc[ids]).values)
        with torch.inference_mode():
            expected = own.model(None, values).logits.softmax(dim=1)
        np.testing.assert_allclose(predictions.loc[ids], expected, atol=1e-6)


def test_the_command_line_cross_fits(recipe: Recipe, tmp_path: Path) -> None:
    file = tmp_path / "frozen.json"
    frozen = load_recipe(recipe, {"training.encoder": "frozen", "data.protocol": "grouped"})
    file.write_text(frozen.model_dump_json())
    result = CliRunner().invoke(app, ["train", str(file), "--folds", "3", "--out", str(tmp_path / "run")])
    assert result.exit_code == 0, result.output
    run = Run(tmp_path / "run")
    assert isinstance(open_run(run).model, CrossFitted)
    assert json.loads((run.path / "metrics.json").read_text())["folds"]["count"] == 3
    assert "mean over 3 folds" in result.output


def test_what_can_not_be_cross_fitted_is_refused(recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="label_leaking"):
        load_recipe(recipe, {"metadata.imputation": "label_leaking", "modality_dropout": {}})
    with pytest.raises(SplitError, match="fewer folds"):
        train_recipe(load_recipe(recipe, {"data.folds": 50}), tmp_path / "run")


def test_a_student_learns_from_predictions_of_members_that_had_not_seen_the_image(run: Run, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["distil", str(run.path), "--out", str(tmp_path / "student")])
    assert result.exit_code == 0, result.output
    student = Run(tmp_path / "student")
    assert set(student.split["split"]) == {"train", "val"}
    assert student.metrics["support"] == 0
    assert student.metrics["balanced_accuracy"] is None
    assert len(student.split) == len(run.split)
    classes = run.model["classes"]
    ids = list(run.predictions["image_id"])[5:9]
    soft = taught(str(run.path), ids, classes)
    expected = run.predictions.set_index("image_id").loc[ids].filter(like="prob_")
    np.testing.assert_array_equal(soft, expected.to_numpy(np.float32))
    # It predicts, with sets, referral and the out-of-distribution check, and the teacher isn't needed any more.
    shutil.move(tmp_path / "student", tmp_path / "moved")
    prediction = Predictor.load(tmp_path / "moved").predict(np.zeros((40, 40, 3), np.uint8))
    assert prediction.likely
    assert prediction.out_of_scope is not None
    with pytest.raises(RunError, match="no patient is left"):
        write_report(Run(tmp_path / "moved"), explained=False)


def test_a_teacher_that_can_not_teach_is_refused(run: Run, tiny_run: Run) -> None:
    classes = run.model["classes"]
    with pytest.raises(RunError, match="isn't a cross-fitted run"):
        taught(str(tiny_run.path), [], classes)
    with pytest.raises(RunError, match="other classes"):
        taught(str(run.path), [], classes[:2])
    with pytest.raises(RunError, match="no prediction of 1"):
        taught(str(run.path), ["nobody"], classes)


@pytest.mark.parametrize("kind", ["inverse", "logit_adjustment", "none"])
def test_soft_labels_are_of_equally_frequent_classes(kind: str) -> None:
    generator, share = np.random.default_rng(0), 0.7
    counts, labels = np.array([60, 30, 10]), np.array([0, 2, 1, 0])
    logits, soft = generator.normal(size=(4, 3)), generator.dirichlet(np.ones(3), 4)
    section = LossSection(class_weights=kind, teacher_share=share)
    loss = DualRefNetLoss(section, torch.tensor(counts))
    found = loss.cross_entropy(*(torch.tensor(each) for each in (logits, labels, soft)))
    frequency = counts / counts.sum()
    adjusted = logits + np.log(frequency) * (kind == "logit_adjustment")
    logs = adjusted - np.log(np.exp(adjusted).sum(axis=1, keepdims=True))
    weights = 1 / frequency if kind == "inverse" else np.ones(3)
    target = soft * frequency if kind != "none" else soft
    target = target / target.sum(axis=1, keepdims=True)
    total = weights[labels].sum()
    hard = -(weights[labels] * logs[np.arange(4), labels]).sum() / total
    taught_part = -(weights * target * logs).sum() / total
    assert float(found) == pytest.approx((1 - share) * hard + share * taught_part, rel=1e-5)
