import hashlib
import json
from typing import Any

import pytest

from dualrefnet.models.registry import METHODS
from dualrefnet.suite.results import caveats, paper, reported, reported_class, reported_splits

AVERAGED = ("f1", "precision", "recall")


def flat(value: Any, *path: str) -> list[tuple[Any, ...]]:
    if isinstance(value, dict):
        return [row for key, inner in value.items() for row in flat(inner, *path, key)]
    return [(*path, value)]


# SHA-256 of the numbers as they were typed from the paper and checked twice: none may change unnoticed.
@pytest.mark.parametrize(
    ("part", "numbers", "digest"),
    [
        ("results", 208, "ac7b70c66aaf757fdd465d7bf1567c722fc020c58042d7898e75d6705f5c0804"),
        ("per_class", 70, "6250df80fd895cbf395e91069a82e805acc3ca4e9597443c10b7edff67cda290"),
        ("splits", 42, "28df4ad2886bed0612c26f1e9e7a18b77a0b648d212dcc5e8e4862dd72026ee2"),
    ],
)
def test_the_numbers_are_those_of_the_paper(part: str, numbers: int, digest: str) -> None:
    rows = flat(paper()[part])
    assert len(rows) == numbers
    assert hashlib.sha256(json.dumps(sorted(rows)).encode()).hexdigest() == digest


def test_every_number_is_found() -> None:
    for *place, metric, value in flat(paper()["results"]):
        usual = {"auc": ["auc_macro_ovr"]} | {name: [f"{name}_macro", f"{name}_weighted"] for name in AVERAGED}
        found = [reported(*place, measure) for measure in usual.get(metric, [metric])]
        assert [number.value for number in [*found, reported(*place, "", metric=metric)] if number] == [value] * (
            len(found) + 1
        )
        assert place[2] in METHODS
    for dataset, backbone, name, measure, value in flat(paper()["per_class"]):
        assert reported_class(dataset, "dualrefnet", backbone, name, measure) == value
    assert {dataset: reported_splits(dataset) for dataset in paper()["splits"]} == paper()["splits"]


@pytest.mark.parametrize(
    ("method", "average"),
    [("metablock", "weighted"), ("ensemble", "weighted"), ("auxnet", "macro"), ("dualrefnet", "macro")],
)
def test_averages_of_table_4_are_told_apart(method: str, average: str) -> None:
    accuracy = reported("pad_ufes_20", "4", method, "vgg13", "accuracy")
    recall = reported("pad_ufes_20", "4", method, "vgg13", "recall_macro")
    assert accuracy
    assert recall
    # The criterion itself: a weighted recall is the accuracy.
    assert (recall.value == accuracy.value) == (average == "weighted")
    assert [recall.comparable(f"recall_{name}") for name in ("macro", "weighted")] == [
        average == name for name in ("macro", "weighted")
    ]
    assert accuracy.comparable("accuracy")


def test_caveats_are_those_of_the_table_and_its_methods() -> None:
    def has(text: str, dataset: str, table: str, *methods: str) -> bool:
        return any(text in note for note in caveats(dataset, table, methods))

    assert has("mixes averages", "pad_ufes_20", "4", "dualrefnet")
    assert not has("mixes averages", "pad_ufes_20", "3a", "dualrefnet")
    assert has("5,066 images", "isic_2019", "3b", "dualrefnet", "visual")
    assert not has("5,066 images", "isic_2019", "3b", "dualrefnet")
    assert has("80:20", "pad_ufes_20", "1")
