import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score

from dualrefnet.files import write_yaml
from dualrefnet.suite.grid import expand, load_suite
from dualrefnet.suite.results import aggregate
from dualrefnet.suite.tables import printed_tables
from suite_folder import (
    ERRORS,
    LABELS,
    SUITE,
    changed,
    image_ids,
    paper_suite,
    planned,
    row,
    write_run,
    write_suite,
    wrong_on,
)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished suite; don't change it."""
    return write_suite(tmp_path_factory.mktemp("suite") / "small", SUITE)


def test_means_are_over_runs_and_pooled_values_over_all_folds_of_a_seed(small: Path) -> None:
    found = aggregate(small).systems
    accuracy = row(found, method="concat", measure="accuracy")
    runs = np.array([18, 16, 20, 20]) / 24
    assert (accuracy["mean"], accuracy["sd"]) == pytest.approx((runs.mean(), runs.std(ddof=1)))
    assert accuracy["pooled"] == pytest.approx((38 / 48 + 36 / 48) / 2)
    assert accuracy[["runs", "planned", "folds", "seeds", "images", "groups"]].tolist() == [4, 4, 2, 2, 48, 24]
    balanced = row(found, method="concat", measure="balanced_accuracy")
    by_seed = [
        balanced_accuracy_score(
            np.tile(LABELS, 2), np.concatenate([wrong_on(*ERRORS["concat", fold, seed]) for fold in (0, 1)])
        )
        for seed in (0, 1)
    ]
    assert balanced["pooled"] == pytest.approx(np.mean(by_seed))
    assert balanced["low"] < balanced["pooled"] < balanced["high"]
    assert balanced["encoder"] == "fine_tuned"
    assert balanced["weights"] == "weights of kind package"
    assert balanced["flags"] == ""


def test_the_interval_resamples_the_patients_of_the_pooled_test_set(small: Path) -> None:
    interval = row(aggregate(small, samples=4000).systems, method="concat", measure="accuracy")
    # Hits of each of the 24 patients, averaged over seeds; here drawn patient by patient.
    hits = [
        np.mean([wrong_on(*ERRORS["concat", fold, seed]) == LABELS for seed in (0, 1)], axis=0)
        .reshape(12, 2)
        .sum(axis=1)
        for fold in (0, 1)
    ]
    drawn = np.random.default_rng(1).choice(np.concatenate(hits), size=(20000, 24)).sum(axis=1) / 48
    # Values come in steps of 1/96.
    assert (interval["low"], interval["high"]) == pytest.approx(tuple(np.quantile(drawn, [0.025, 0.975])), abs=0.0105)


def test_a_known_difference_is_found_and_the_reference_is_not_compared_with_itself(small: Path) -> None:
    found = aggregate(small).comparisons
    assert found["method"].tolist() == ["concat", "concat"]
    accuracy = row(found, measure="accuracy")
    assert accuracy["difference"] == pytest.approx((37 - 46) / 48)
    assert accuracy["low"] < accuracy["difference"] < accuracy["high"] < 0
    assert accuracy["p"] <= 2 / 1001
    # One comparison a measure: nothing to correct.
    assert accuracy["p_holm"] == accuracy["p"]
    assert accuracy["reference"] == "dualrefnet efficientnet_lite0"


def test_p_is_corrected_within_a_measure_and_samples_suffice_for_the_number_of_comparisons(tmp_path: Path) -> None:
    suite = changed(grid_methods=["dualrefnet", "concat", "metablock", "metanet"], grid_folds=[0], grid_seeds=[0])
    errors = {"dualrefnet": (), "concat": (0, 2, 4, 6, 8, 10, 12, 14), "metablock": (0,), "metanet": ()}
    found = aggregate(write_suite(tmp_path, suite, lambda cell: wrong_on(*errors[cell.method])), samples=10)
    assert found.samples == 300
    p, corrected = (
        found.comparisons[found.comparisons["measure"] == "accuracy"].set_index("method")[name]
        for name in ("p", "p_holm")
    )
    assert corrected["concat"] == pytest.approx(3 * p["concat"])
    assert corrected["concat"] < 0.05
    assert (p["metanet"], corrected["metanet"]) == (1, 1)
    assert corrected["metablock"] == pytest.approx(min(1, 2 * p["metablock"]))


def test_an_unreadable_run_is_said_and_does_not_stop_the_rest(small: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(small, tmp_path / "suite")
    run = folder / "runs" / "sample-concat-efficientnet_lite0-fold1-seed1"
    (run / "predictions.csv").unlink()
    found = aggregate(folder)
    assert found.collection.missing["state"].tolist() == ["unreadable"]
    assert "predictions.csv" in found.collection.missing["error"].iloc[0]
    assert row(found.systems, method="dualrefnet", measure="accuracy")["flags"] == ""


def test_folds_that_share_images_are_not_pooled(small: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(small, tmp_path / "suite")
    for cell in expand(load_suite(folder / "suite.yaml")):
        if cell.method == "concat" and cell.fold == 1:
            ids = ["f0-05", "f0-07", *image_ids(cell)[2:]]
            write_run(folder / "runs" / cell.run, cell, planned(cell), ids=ids)
    concat = row(aggregate(folder).systems, method="concat", measure="accuracy")
    assert concat["flags"] == "not pooled: 2 test images are in more than one fold of seed 0"
    assert np.isnan(concat["pooled"])
    assert concat["mean"] == pytest.approx(np.mean([18, 16, 20, 20]) / 24)


def test_a_method_without_images_has_no_random_encoder(tmp_path: Path) -> None:
    suite = changed(grid_methods=["metadata_only"], grid_folds=[0], grid_seeds=[0], reference=None)
    found = aggregate(write_suite(tmp_path, suite, lambda cell: wrong_on(0), weights="none")).systems
    assert found["flags"].unique().tolist() == [""]
    assert found["encoder"].unique().tolist() == ["none"]


def test_an_ablation_has_the_papers_ablated_number_only(tmp_path: Path) -> None:
    paper = {"table": "text", "metrics": {"balanced_accuracy": "balanced_accuracy_cross_attention_fusion"}}
    variants = [
        {"name": "cross", "set": {"model.fusion": "cross_attention"}, "paper": paper},
        {"name": "plain", "set": {"loss.penalty": 0}},
    ]
    found = paper_suite(
        tmp_path,
        table="text",
        rows="variant",
        methods=["dualrefnet"],
        measures=["balanced_accuracy", "kappa"],
        block={"variants": variants},
    ).systems
    assert row(found, variant="cross", measure="balanced_accuracy")["paper"] == 0.6899
    assert (
        found.drop(found.index[(found["variant"] == "cross") & (found["measure"] == "balanced_accuracy")])["paper"]
        .isna()
        .all()
    )


def test_a_variant_is_compared_with_the_same_backbone_of_the_reference(tmp_path: Path) -> None:
    suite = changed(grid_folds=[0], grid_seeds=[0], grid_backbones=["vgg13", "resnet50"])
    found = aggregate(write_suite(tmp_path, suite, lambda cell: wrong_on(0))).comparisons
    assert found[["backbone", "reference"]].drop_duplicates().to_numpy().tolist() == [
        ["vgg13", "dualrefnet vgg13"],
        ["resnet50", "dualrefnet resnet50"],
    ]


def test_a_reference_with_one_backbone_is_compared_with_methods_that_have_another(tmp_path: Path) -> None:
    first = changed(grid_folds=[0], grid_seeds=[0], grid_methods=["dualrefnet"], grid_backbones=["vgg13"])
    second = changed(grid_folds=[0], grid_seeds=[0], grid_methods=["concat"], grid_backbones=["resnet50"])
    suite = {**first, "grid": first["grid"] + second["grid"]}
    found = aggregate(write_suite(tmp_path, suite, lambda cell: wrong_on(0))).comparisons
    assert found[["method", "reference"]].drop_duplicates().to_numpy().tolist() == [["concat", "dualrefnet vgg13"]]


def test_tables_of_a_real_run(tiny_run: Any, tmp_path: Path) -> None:
    recipe = tiny_run.recipe.model_dump(mode="json", exclude_unset=True)
    suite = {
        "name": "real",
        "title": "Real",
        "measures": ["balanced_accuracy", "malignant.auc"],
        "grid": [{"recipe": recipe}],
    }
    write_yaml(tmp_path / "suite.yaml", suite)
    (cell,) = expand(load_suite(tmp_path / "suite.yaml"))
    shutil.copytree(tiny_run.path, tmp_path / "runs" / cell.run)
    found = aggregate(tmp_path)
    for measure, expected in (
        ("balanced_accuracy", tiny_run.metrics["balanced_accuracy"]),
        ("malignant.auc", tiny_run.metrics["malignant"]["auc"]),
    ):
        value = row(found.systems, measure=measure)
        assert value["pooled"] == pytest.approx(expected)
        assert value["mean"] == pytest.approx(expected)
    assert "drawn data" in found.systems["flags"].iloc[0]
    assert "random weights" in found.systems["flags"].iloc[0]
    assert printed_tables(found)[0].rows[0][0].text == "DualRefNet"


def test_runs_of_unlike_recipes_and_seeds_with_other_images_are_flagged(small: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(small, tmp_path / "suite")
    changes = load_suite(folder / "suite.yaml").model_dump(mode="json")
    changes["grid"][0]["set"]["training.epochs"] = 3
    write_yaml(tmp_path / "other.yaml", changes)
    for cell in expand(load_suite(tmp_path / "other.yaml")):
        if (cell.method, cell.seed) == ("concat", 1):
            write_run(
                folder / "runs" / cell.run,
                cell,
                planned(cell),
                ids=[f"s1f{cell.fold}-{index:02}" for index in range(24)],
            )
    found = aggregate(folder).systems
    assert row(found, method="dualrefnet", measure="accuracy")["flags"] == ""
    expected = "its runs have different recipes; not pooled: the seeds have different test images"
    assert row(found, method="concat", measure="accuracy")["flags"] == expected
