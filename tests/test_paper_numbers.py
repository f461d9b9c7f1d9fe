from importlib import resources

import pandas as pd
import pytest

from dualrefnet.models.registry import METHODS
from dualrefnet.suite.paper import PAPER_METRICS, caveats, reported, reported_class, reported_classes, reported_split


def table(name: str) -> pd.DataFrame:
    with (resources.files("dualrefnet.suite") / "reported" / name).open(encoding="utf-8") as file:
        return pd.read_csv(file, dtype={"table": str})


def test_every_printed_result_is_found_under_a_measure_of_ours_or_its_own_name() -> None:
    rows = table("reported_results.csv")
    assert len(rows) == 208
    for row in rows.to_dict("records"):
        place = (row["dataset"], row["table"], row["method"], row["backbone"])
        measures = [measure for measure, metric in PAPER_METRICS.items() if metric == row["metric"]]
        found = [reported(*place, measure) for measure in measures] or [
            reported(*place, "balanced_accuracy", metric=row["metric"])
        ]
        assert [number.value for number in found if number] == [row["value"]] * len(found), row


def test_every_method_with_a_printed_result_is_one_of_ours() -> None:
    assert set(table("reported_results.csv")["method"]) <= set(METHODS)


def test_known_cells() -> None:
    number = reported("pad_ufes_20", "3a", "dualrefnet", "vgg13", "balanced_accuracy")
    assert number is not None
    assert (number.value, number.average) == (0.845, "")
    assert reported("isic_2019", "3b", "auxnet", "vgg13", "accuracy") is None
    assert reported("pad_ufes_20", "3a", "dualrefnet", "vgg13", "mcc") is None
    kappa = reported("pad_ufes_20", "3a", "dualrefnet", "vgg13", "kappa")
    assert kappa is not None
    assert kappa.value == 0.8
    assert reported("sample", "3a", "dualrefnet", "vgg13", "accuracy") is None


def test_table_4_fits_any_backbone_and_table_3a_does_not() -> None:
    number = reported("pad_ufes_20", "4", "jif_mmfa", "resnet50", "accuracy")
    assert number is not None
    assert number.value == 0.83
    assert reported("pad_ufes_20", "3a", "dualrefnet", "efficientnet_lite0", "accuracy") is None


@pytest.mark.parametrize(
    ("method", "average"),
    [("metablock", "weighted"), ("ensemble", "weighted"), ("auxnet", "macro"), ("dualrefnet", "macro")],
)
def test_averages_of_table_4_are_told_apart(method: str, average: str) -> None:
    accuracy, recall = (
        reported("pad_ufes_20", "4", method, "vgg13", measure) for measure in ("accuracy", "recall_macro")
    )
    assert accuracy is not None
    assert recall is not None
    # The criterion itself: a weighted recall is the accuracy.
    assert (recall.value == accuracy.value) == (average == "weighted")
    assert recall.average == average
    assert [recall.comparable(measure) for measure in ("recall_macro", "recall_weighted")] == [
        average == "macro",
        average == "weighted",
    ]
    assert accuracy.comparable("accuracy")


def test_every_printed_class_value_is_found_and_its_doubles_agree() -> None:
    same = {"precision": "ppv", "classwise_accuracy": "sensitivity"}
    rows = table("reported_per_class.csv").to_dict("records")
    assert len(rows) == 98
    for row in rows:
        measure = same.get(row["metric"], row["metric"])
        assert reported_class(row["dataset"], "dualrefnet", row["backbone"], row["class"], measure) == row["value"]
    assert reported_class("pad_ufes_20", "metablock", "vgg13", "MEL", "ppv") is None
    assert reported_class("pad_ufes_20", "dualrefnet", "resnet50", "MEL", "ppv") is None


def test_the_counts_of_table_1_sum_to_the_data_sets() -> None:
    totals = {
        (dataset, side): sum(reported_split(dataset, side, name) or 0 for name in reported_classes(dataset))
        for dataset in ("pad_ufes_20", "isic_2019")
        for side in ("train", "val", "test")
    }
    assert list(totals.values()) == [1532, 383, 383, 16185, 1799, 4496]
    assert reported_split("pad_ufes_20", "test", "MEL") == 9
    assert reported_split("pad_ufes_20", "test", "VASC") is None
    assert reported_classes("sample") == ()


def test_caveats_are_those_of_the_table_and_its_methods() -> None:
    assert any("mixes averages" in note for note in caveats("pad_ufes_20", "4", ["dualrefnet"]))
    assert not any("mixes averages" in note for note in caveats("pad_ufes_20", "3a", ["dualrefnet"]))
    assert any("5,066 images" in note for note in caveats("isic_2019", "3b", ["dualrefnet", "visual"]))
    assert not any("5,066 images" in note for note in caveats("isic_2019", "3b", ["dualrefnet"]))
    assert any("copied" in note for note in caveats("pad_ufes_20", "3a", ["concat"]))
    assert any("NPVs of ACK, BCC and SCC" in note for note in caveats("pad_ufes_20", "2a", ["dualrefnet"]))
    assert caveats("sample", "3a", ["dualrefnet"]) == []
