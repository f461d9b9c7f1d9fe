import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import balanced_accuracy_score

from dualrefnet.files import write_json, write_yaml
from dualrefnet.recipe import load_recipe
from dualrefnet.suite.grid import expand, load_suite
from dualrefnet.suite.results import (
    FROZEN,
    LABEL_LEAKING,
    LEAKING_SPLIT,
    RANDOM,
    SYNTHETIC,
    SuiteResults,
    aggregate,
    departures,
    reported_splits,
)
from suite_folder import (
    ERRORS,
    IMAGES,
    LABELS,
    changed,
    image_ids,
    paper_suite,
    planned,
    row,
    write_run,
    write_suite,
    wrong_on,
)

ONE = {"grid_folds": [0], "grid_seeds": [0]}


def test_means_are_over_runs_and_pooled_values_over_all_folds_of_a_seed(small_results: SuiteResults) -> None:
    found = small_results.systems
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
    expected = ["fine_tuned", "weights of kind package", "patient", ()]
    assert balanced[["encoder", "weights", "unit", "flags"]].tolist() == expected


def test_the_interval_resamples_the_patients_of_the_pooled_test_set(small: Path) -> None:
    interval = row(aggregate(small, samples=4000).systems, method="concat", measure="accuracy")
    # Correct images of each of the 24 patients, averaged over seeds; here drawn patient by patient.
    hits = [
        np.mean([wrong_on(*ERRORS["concat", fold, seed]) == LABELS for seed in (0, 1)], axis=0)
        .reshape(12, 2)
        .sum(axis=1)
        for fold in (0, 1)
    ]
    drawn = np.random.default_rng(1).choice(np.concatenate(hits), size=(20000, 24)).sum(axis=1) / 48
    # Values come in steps of 1/96.
    assert (interval["low"], interval["high"]) == pytest.approx(tuple(np.quantile(drawn, [0.025, 0.975])), abs=0.0105)


def test_a_known_difference_is_found_and_the_reference_is_not_compared_with_itself(small_results: SuiteResults) -> None:
    found = small_results.comparisons
    assert found["method"].tolist() == ["concat", "concat"]
    accuracy = row(found, measure="accuracy")
    assert accuracy["difference"] == pytest.approx((37 - 46) / 48)
    assert accuracy["low"] < accuracy["difference"] < accuracy["high"] < 0
    # One comparison per measure: nothing to correct.
    assert accuracy["p_holm"] == accuracy["p"] <= 2 / 1001
    assert accuracy["reference"] == "dualrefnet efficientnet_lite0"


def test_p_is_corrected_within_a_measure_and_samples_suffice_for_the_number_of_comparisons(tmp_path: Path) -> None:
    suite = changed(grid_methods=["dualrefnet", "concat", "metablock", "metanet"], **ONE)
    errors = {"dualrefnet": (), "concat": (0, 2, 4, 6, 8, 10, 12, 14), "metablock": (0,), "metanet": ()}
    found = aggregate(write_suite(tmp_path, suite, lambda cell: wrong_on(*errors[cell.key.method])), samples=10)
    assert found.samples == 300
    accuracy = found.comparisons[found.comparisons["measure"] == "accuracy"].set_index("method")
    p, corrected = accuracy["p"], accuracy["p_holm"]
    assert corrected["concat"] == pytest.approx(3 * p["concat"])
    assert corrected["concat"] < 0.05
    assert (p["metanet"], corrected["metanet"]) == (1, 1)
    assert corrected["metablock"] == pytest.approx(min(1, 2 * p["metablock"]))


def test_a_missing_run_is_recorded_and_the_complete_seed_is_pooled(small: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(small, tmp_path / "suite")
    run = "sample-{}-efficientnet_lite0-fold{}-seed{}".format
    lost, failed, broken = run("concat", 1, 1), run("dualrefnet", 0, 0), run("dualrefnet", 1, 0)
    shutil.rmtree(folder / "runs" / lost)
    (folder / "runs" / failed / "metrics.json").unlink()
    (folder / "runs" / broken / "predictions.csv").unlink()
    write_json(folder / "failures" / f"{failed}.json", {"error": "out of memory_", "kind": "RuntimeError", "log": ""})
    found = aggregate(folder)
    missing = found.missing.set_index("cell")
    assert missing["state"].to_dict() == {failed: "failed", broken: "unreadable", lost: "not started"}
    assert missing["error"][failed] == "out of memory_"
    assert "predictions.csv" in missing["error"][broken]
    concat = row(found.systems, method="concat", measure="accuracy")
    assert (concat["runs"], concat["planned"], concat["flags"]) == (3, 4, ("pooled over 2 runs only",))
    assert concat["pooled"] == pytest.approx(38 / 48)
    assert concat["mean"] == pytest.approx(np.mean([18, 16, 20]) / 24)
    # Of the reference seed 1 is complete; both are measured on the same 48 images.
    assert row(found.comparisons, measure="accuracy")["difference"] == pytest.approx(38 / 48 - 45 / 48)


@pytest.mark.parametrize("shared", [True, False])
def test_what_was_tested_on_other_images_is_neither_pooled_nor_compared(
    shared: bool, small: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(small, tmp_path / "suite")
    for cell in expand(load_suite(folder / "suite.yaml")):
        if cell.key.method == "concat" and cell.fold == 1:
            other = ["f0-05", "f0-07", *image_ids(cell)[2:]] if shared else [f"other-{i:02}" for i in range(IMAGES)]
            write_run(folder / "runs" / cell.run, cell, planned(cell), ids=other)
    found = aggregate(folder)
    concat = row(found.systems, method="concat", measure="accuracy")
    assert concat["mean"] == pytest.approx(np.mean([18, 16, 20, 20]) / 24)
    if shared:
        assert concat["flags"] == ("not pooled: 2 test images are in more than one fold of seed 0",)
        assert np.isnan(concat["pooled"])
    else:
        assert concat["pooled"] == pytest.approx(37 / 48)
        assert found.comparisons["note"].unique().tolist() == ["not compared: the reference was tested on other images"]
    assert found.comparisons[["difference", "p", "p_holm"]].isna().all(axis=None)


def test_runs_of_different_recipes_and_seeds_with_other_images_are_flagged(small: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(small, tmp_path / "suite")
    changes = load_suite(folder / "suite.yaml").model_dump(mode="json")
    changes["grid"][0]["set"]["training.epochs"] = 3
    write_yaml(tmp_path / "other.yaml", changes)
    for cell in expand(load_suite(tmp_path / "other.yaml")):
        if (cell.key.method, cell.seed) == ("concat", 1):
            ids = [f"s1f{cell.fold}-{index:02}" for index in range(24)]
            write_run(folder / "runs" / cell.run, cell, planned(cell), ids=ids)
    found = aggregate(folder).systems
    assert row(found, method="dualrefnet", measure="accuracy")["flags"] == ()
    expected = ("its runs have different recipes", "not pooled: the seeds have different test images")
    assert row(found, method="concat", measure="accuracy")["flags"] == expected


def test_flags_name_what_limits_a_number(tmp_path: Path) -> None:
    variants = [
        {"name": "leak", "set": {"metadata.imputation": "label_leaking", "modality_dropout": {}}},
        {"name": "frozen", "set": {"training.encoder": "frozen"}},
        {"name": "metadata", "set": {"model.method": "metadata_only"}},
    ]
    suite = changed(grid_methods=["dualrefnet"], grid_variants=variants, rows="variant", reference="frozen", **ONE)
    folder = write_suite(tmp_path / "a", suite, lambda cell: wrong_on(0), weights="none", drawn=True)
    found = aggregate(folder)
    flags = {name: row(found.systems, variant=name, measure="accuracy")["flags"] for name in ("leak", "frozen")}
    assert flags == {"leak": (LABEL_LEAKING, SYNTHETIC, RANDOM), "frozen": (SYNTHETIC, FROZEN, RANDOM)}
    # A method without images has no random encoder.
    metadata = row(found.systems, variant="metadata", measure="accuracy")
    assert (metadata["flags"], metadata["encoder"]) == ((SYNTHETIC,), "none")
    leaking = paper_suite(tmp_path / "b", ["dualrefnet"], ["accuracy"])
    assert leaking.systems["flags"].tolist() == [(LEAKING_SPLIT,)]


def test_an_ablation_has_only_the_paper_s_number_for_the_ablated_model(tmp_path: Path, small_table_1: None) -> None:
    paper = {"table": "text", "metrics": {"balanced_accuracy": "balanced_accuracy_cross_attention_fusion"}}
    variants = [
        {"name": "cross", "set": {"model.fusion": "cross_attention"}, "paper": paper},
        {"name": "plain", "set": {"loss.penalty": 0}},
    ]
    measures, block = ["balanced_accuracy", "kappa"], {"variants": variants}
    found = paper_suite(tmp_path, ["dualrefnet"], measures, table="text", rows="variant", block=block).systems
    printed = found[found["paper"].notna()]
    assert printed[["variant", "measure", "paper"]].to_numpy().tolist() == [["cross", "balanced_accuracy", 0.6899]]


TABLE_1 = [
    (label, part)
    for part, images in reported_splits("pad_ufes_20").items()
    for label in images
    for _ in range(images[label])
]


def test_departures_name_what_is_not_the_paper_s_experiment() -> None:
    split = pd.DataFrame(TABLE_1, columns=["label", "split"])
    published = load_recipe("pad_ufes_20_paper")
    assert departures(published, split) == []
    # Another row or column of the tables, another place, machine or seed.
    same = {"model.method": "metablock", "model.backbone": "resnet50", "model.weights": "hub", "seed": 3}
    same |= {"data.root": "elsewhere", "training.device": "cuda", "evaluation.bootstrap": 9, "name": "other"}
    assert departures(load_recipe(published, same), split) == []
    members = ["efficientnet_b4", "densenet121", "resnet50"]
    ensemble = load_recipe(published, {"model.method": "ensemble", "model.members": members})
    assert departures(ensemble, split) == []
    for key, value in {"image.size": 64, "training.epochs": 1, "loss.penalty": 0.0, "model.target": "native"}.items():
        (found,) = departures(load_recipe(published, {key: value}), split)
        assert found.startswith(f"{key} {value}, not ")
        # The paper's number of an ablation is of the ablated model.
        assert departures(load_recipe(published, {key: value}), split, {key: value}) == []
        assert len(departures(published, split, {key: value})) == 1
    pooled = {"model.vgg_head": "pool"}
    assert departures(load_recipe(published, pooled), split) == []
    metablock = load_recipe(published, {**pooled, "model.method": "metablock"})
    assert departures(metablock, split) == ["model.vgg_head pool, not flatten"]
    assert departures(published, split.drop(len(split) - 1)) == ["382 of 383 validation images"]
    swapped = split.assign(label=split["label"].where(split["split"] != "test", "ACK"))
    assert departures(published, swapped) == ["test images of other classes"]
    assert departures(load_recipe(published, {"model.weights": "none"}), split) == [RANDOM]
    assert len(departures(load_recipe("sample"))) == 1


def test_the_reference_has_the_same_backbone_or_is_the_only_one(tmp_path: Path) -> None:
    suite = changed(grid_backbones=["vgg13", "resnet50"], **ONE)
    found = aggregate(write_suite(tmp_path / "a", suite, lambda cell: wrong_on(0))).comparisons
    pairs = found[["backbone", "reference"]].drop_duplicates().to_numpy().tolist()
    assert pairs == [["vgg13", "dualrefnet vgg13"], ["resnet50", "dualrefnet resnet50"]]
    first = changed(grid_methods=["dualrefnet"], grid_backbones=["vgg13"], **ONE)
    second = changed(grid_methods=["concat"], grid_backbones=["resnet50"], **ONE)
    suite = {**first, "grid": first["grid"] + second["grid"]}
    found = aggregate(write_suite(tmp_path / "b", suite, lambda cell: wrong_on(0))).comparisons
    assert found[["method", "reference"]].drop_duplicates().to_numpy().tolist() == [["concat", "dualrefnet vgg13"]]


def test_an_encoder_may_be_the_reference_of_each_data_set(tmp_path: Path) -> None:
    errors = {"vgg13": (0, 1), "swin_b": tuple(range(8)), "vit_b_16": (0, 1), "resnet50": ()}
    first = changed(grid_methods=["dualrefnet", "concat"], grid_backbones=["vgg13", "swin_b", "vit_b_16"], **ONE)
    second = {"recipe": "pad_ufes_20", "methods": ["dualrefnet"], "backbones": ["resnet50", "swin_b"]}
    suite = {**first, "reference": {"sample": "vgg13", "pad_ufes_20": "resnet50"}, "grid": [*first["grid"], second]}
    folder = write_suite(tmp_path, suite, lambda cell: wrong_on(*errors[cell.key.backbone]))
    found = aggregate(folder, 400).comparisons
    accuracy = found[found["measure"] == "accuracy"].set_index(["dataset", "method", "backbone"])
    assert accuracy["reference"].to_dict() == {
        ("sample", "dualrefnet", "swin_b"): "dualrefnet vgg13",
        ("sample", "dualrefnet", "vit_b_16"): "dualrefnet vgg13",
        ("sample", "concat", "swin_b"): "concat vgg13",
        ("sample", "concat", "vit_b_16"): "concat vgg13",
        ("pad_ufes_20", "dualrefnet", "swin_b"): "dualrefnet resnet50",
    }
    assert accuracy["difference"].tolist() == pytest.approx([-6 / 24, 0, -6 / 24, 0, -8 / 24])
    assert (accuracy.loc[("sample", "dualrefnet", "swin_b"), "high"]) < 0
    assert accuracy.loc[("sample", "dualrefnet", "vit_b_16"), "p"] == 1


def test_classes_are_compared_on_the_same_resamples_and_corrected_over_all_of_them(tmp_path: Path) -> None:
    # Of eight images of ACK the reference errs on none, Concat on six; of BCC both on two other ones; of MEL alike.
    errors = {"dualrefnet": (1, 4, 2), "concat": (0, 3, 6, 9, 12, 15, 7, 10, 2)}
    suite = changed(grid_methods=["dualrefnet", "concat"], per_class=True, **ONE)
    found = aggregate(write_suite(tmp_path, suite, lambda cell: wrong_on(*errors[cell.key.method])), samples=50)
    assert found.samples == 300
    rows = found.class_comparisons[found.class_comparisons["measure"] == "sensitivity"].set_index("class")
    assert rows["value"].to_dict() == pytest.approx({"ACK": 2 / 8, "BCC": 6 / 8, "MEL": 7 / 8})
    assert rows["reference_value"].to_dict() == pytest.approx({"ACK": 1, "BCC": 6 / 8, "MEL": 7 / 8})
    assert rows["difference"].to_dict() == pytest.approx({"ACK": -6 / 8, "BCC": 0, "MEL": 0})
    assert rows.loc["ACK", "high"] < 0 <= rows.loc["BCC", "high"]
    assert (rows.loc["MEL", ["low", "high", "p"]].tolist()) == [0, 0, 1]
    assert rows.loc["ACK", "p_holm"] == pytest.approx(3 * rows.loc["ACK", "p"])
    assert rows.loc["ACK", "p_holm"] < 0.05
    # An ACK taken for BCC costs BCC's precision: 6 of 6 + 1 + 6 (the error of a class is the next one).
    precision = found.class_comparisons[found.class_comparisons["measure"] == "ppv"].set_index("class")
    assert precision.loc["BCC", ["value", "reference_value"]].tolist() == pytest.approx([6 / 12, 6 / 6])
    assert precision["reference"].unique().tolist() == ["dualrefnet efficientnet_lite0"]


def test_the_results_of_a_real_run_are_its_metrics(tiny_run: Any, tmp_path: Path) -> None:
    recipe = tiny_run.recipe.model_dump(mode="json", exclude_unset=True)
    measures = ["balanced_accuracy", "malignant.auc"]
    write_yaml(
        tmp_path / "suite.yaml", {"name": "real", "title": "Real", "measures": measures, "grid": [{"recipe": recipe}]}
    )
    (cell,) = expand(load_suite(tmp_path / "suite.yaml"))
    shutil.copytree(tiny_run.path, tmp_path / "runs" / cell.run)
    found = aggregate(tmp_path).systems
    expected = [tiny_run.metrics["balanced_accuracy"], tiny_run.metrics["malignant"]["auc"]]
    assert found["pooled"].tolist() == found["mean"].tolist() == pytest.approx(expected)
    assert found["flags"].tolist() == [(SYNTHETIC, RANDOM)] * 2
