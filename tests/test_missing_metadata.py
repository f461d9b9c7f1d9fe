"""Runs with missing metadata: of hand-made models what is left is known."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from dualrefnet.analysis.missing_metadata import (
    ALL_FIELDS,
    MEASURES,
    NO_FIELDS,
    WITH_IMAGE,
    WITHOUT_IMAGE,
    MissingMetadata,
    compare_missing_metadata,
    draw_missing_metadata,
    draw_missing_patterns,
    draw_orders,
    find_patterns,
    keep_share,
    measure_missing_metadata,
    missing_difference_table,
    missing_metadata_table,
    missing_pattern_table,
)
from dualrefnet.analysis.opened_run import OpenedRun, open_run
from dualrefnet.data.schema import DatasetSchema, MetadataField
from dualrefnet.errors import DataError
from dualrefnet.evaluation.comparison import PooledBootstrap, paired_difference
from dualrefnet.evaluation.metrics import compute_metrics
from dualrefnet.run import Run
from hand_made import FormOnly, PictureOnly, hand_made
from readable import assert_readable

SHARES = (0.0, 0.5, 1.0)


@pytest.fixture(scope="module")
def opened(tiny_run: Run) -> OpenedRun:
    return open_run(tiny_run, device=torch.device("cpu"))


@pytest.fixture(scope="module")
def real(opened: OpenedRun) -> MissingMetadata:
    return measure_missing_metadata(opened, SHARES, draws=2, samples=50)


@pytest.fixture(scope="module")
def made(opened: OpenedRun, tmp_path_factory: pytest.TempPathFactory) -> dict[str, MissingMetadata]:
    """One run that looks at the age, one that looks at the lesion; of each one that reads no more than that."""
    folder = tmp_path_factory.mktemp("made")
    runs = {
        "age": hand_made(opened, folder / "age", "age"),
        "form": hand_made(opened, folder / "form", "age", FormOnly),
        "centre": hand_made(opened, folder / "centre", "centre"),
        "picture": hand_made(opened, folder / "picture", "centre", PictureOnly),
    }
    return {name: measure_missing_metadata(run, SHARES, draws=3, samples=40, name=name) for name, run in runs.items()}


def balanced(availability: MissingMetadata, photograph: str) -> list[float]:
    curve = availability.curve
    return curve[(curve["photograph"] == photograph) & (curve["measure"] == "balanced_accuracy")]["value"].tolist()


@given(arrays(bool, (4, 6)), st.integers(0, 50))
def test_of_each_row_the_share_is_kept_and_more_holds_less(recorded: np.ndarray, seed: int) -> None:
    order = np.random.default_rng(seed).random((4, 7))
    before = np.zeros_like(recorded)
    for share in np.linspace(0, 1, 11):
        kept = keep_share(recorded, order, share)
        assert not (kept & ~recorded).any()
        assert not (before & ~kept).any()
        for row, total in zip(kept.sum(axis=1), recorded.sum(axis=1), strict=True):
            assert abs(row - share * total) < 1
        before = kept
    assert (before == recorded).all()


def test_runs_of_one_data_set_lose_the_same_answers_whatever_their_split(opened: OpenedRun) -> None:
    split = opened.split.copy()
    split["split"] = "test"
    every = draw_orders(replace(opened, split=split.sort_values("image_id")), 2, seed=0)
    ids = split["image_id"].sort_values().tolist()
    places = [ids.index(image_id) for image_id in opened.rows("test")["image_id"]]
    np.testing.assert_array_equal(every[:, places], draw_orders(opened, 2, seed=0))
    assert not np.array_equal(draw_orders(opened, 2, seed=1), draw_orders(opened, 2, seed=0))


def test_a_model_of_one_answer_is_right_where_it_was_kept(
    opened: OpenedRun, made: dict[str, MissingMetadata], tmp_path: Path
) -> None:
    run = hand_made(opened, tmp_path / "run", "age")
    rows, names = run.rows("test"), [field.name for field in run.dataset.schema.fields]
    labels = run.image_examples("test").labels
    recorded, orders = rows[names].notna().to_numpy(), draw_orders(run, 3, seed=0)
    expected = []
    for order in orders:
        kept = keep_share(recorded, order, 0.5)
        # By hand: removed, encoded (the imputer writes an age), read.
        forms = run.metadata.encode(
            rows.assign(**{name: rows[name].where(kept[:, index]) for index, name in enumerate(names)})
        ).values
        place = [field.name for field in run.metadata.fields].index("age")
        ages = forms[:, run.metadata.names.index("age")] * run.metadata.std[place] + run.metadata.mean[place]
        predicted = np.clip(np.round(ages // 10), 0, 5).astype(int)
        known = kept[:, names.index("age")]
        assert (predicted[known] == labels[known]).all()
        assert (predicted[~known] == labels[~known]).mean() < 0.5
        expected.append(compute_metrics(labels, np.eye(6)[predicted], run.classes)["balanced_accuracy"])
    for photograph in (WITH_IMAGE, WITHOUT_IMAGE):
        values = balanced(made["age"], photograph)
        assert values[1] == pytest.approx(np.mean(expected))
        assert values[2] == 1
        assert values[0] == pytest.approx(1 / 6)
    assert balanced(made["form"], WITHOUT_IMAGE) == balanced(made["age"], WITHOUT_IMAGE)


def test_a_model_of_the_lesion_needs_the_photograph_and_no_answer(made: dict[str, MissingMetadata]) -> None:
    assert balanced(made["centre"], WITH_IMAGE) == [1, 1, 1]
    assert balanced(made["centre"], WITHOUT_IMAGE) == pytest.approx([1 / 6] * 3)
    assert balanced(made["picture"], WITH_IMAGE) == [1, 1, 1]
    assert balanced(made["picture"], WITHOUT_IMAGE) == []
    assert balanced(made["form"], WITH_IMAGE) == []


def test_patterns_remove_what_they_name_and_nothing_else(made: dict[str, MissingMetadata]) -> None:
    table = (
        made["age"].patterns.query("measure == 'balanced_accuracy' and photograph == @WITH_IMAGE").set_index("removed")
    )
    for removed, row in table.iterrows():
        gone = "age" in str(removed).split("; ")
        assert (row["value"] == 1) == (not gone), removed
        assert row["difference"] == pytest.approx(row["value"] - 1)
    assert table.iloc[0]["pattern"] == ALL_FIELDS
    assert table.iloc[-1]["pattern"] == NO_FIELDS
    assert table.iloc[-1]["answers_kept"] == 0


def test_the_whole_form_is_what_the_run_predicted(opened: OpenedRun, real: MissingMetadata) -> None:
    metrics = opened.run.metrics
    curve = real.curve.query("photograph == @WITH_IMAGE and share == 1").set_index("measure")
    for measure in MEASURES:
        assert curve.loc[measure, "value"] == pytest.approx(metrics[measure], abs=1e-3)
        assert curve.loc[measure, "difference"] == 0
    assert real.curve["draws"].tolist() == [1, 1, 2, 2, 1, 1] * 2
    np.testing.assert_array_equal(real.curve["answers_kept"].to_numpy()[:2], [0, 0])


def test_runs_are_compared_in_pairs(opened: OpenedRun, made: dict[str, MissingMetadata]) -> None:
    table = compare_missing_metadata(made["age"], made["picture"])
    assert set(table["photograph"]) == {WITH_IMAGE}, "a run that reads no form has no answer without a photograph"
    half = table.query("share == 0.5 and measure == 'auc_macro_ovr'").iloc[0]
    assert half["difference"] == pytest.approx(half["first"] - half["second"])
    assert half["second"] == 1
    assert half["low"] <= half["difference"] <= half["high"] < 0
    assert table.query("share == 1")["difference"].tolist() == [0, 0]
    # A run that reads no photograph is set beside both.
    other = compare_missing_metadata(made["centre"], made["form"])
    assert set(other["photograph"]) == {WITH_IMAGE, WITHOUT_IMAGE}
    assert other.query("share == 1 and photograph == @WITHOUT_IMAGE and measure == 'balanced_accuracy'")[
        "difference"
    ].iloc[0] == pytest.approx(1 / 6 - 1)
    back = compare_missing_metadata(made["form"], made["centre"])
    merged = other.merge(back, on=["photograph", "share", "pattern", "measure"], suffixes=("", "_back"))
    assert len(merged) == len(other) == len(back)
    np.testing.assert_allclose(merged["difference"], -merged["difference_back"])
    np.testing.assert_allclose(merged["low"], -merged["high_back"])


def test_the_interval_of_a_difference_is_that_of_the_paired_bootstrap(
    opened: OpenedRun, made: dict[str, MissingMetadata]
) -> None:
    labels = opened.image_examples("test").labels
    groups = opened.groups.loc[list(opened.rows("test")["image_id"])].to_numpy()
    # What stands for no photograph has the red of the fifth class.
    right, constant = np.eye(6)[labels], np.eye(6)[np.full(len(labels), 4)]
    pair = paired_difference(labels, right, constant, groups, opened.classes, samples=40)
    row = compare_missing_metadata(made["form"], made["centre"]).query(
        "share == 1 and photograph == @WITHOUT_IMAGE and measure == 'balanced_accuracy'"
    )
    assert [row["low"].iloc[0], row["high"].iloc[0]] == pytest.approx([pair.low, pair.high])


def test_runs_that_can_t_be_compared_are_refused(made: dict[str, MissingMetadata]) -> None:
    first = made["age"]
    for other, what in (
        (replace(first, image_ids=first.image_ids[::-1]), "test images"),
        (replace(first, groups=first.groups[::-1]), "patients"),
        (replace(first, seed=7), "draws, samples and seed"),
        (replace(first, draws=9), "draws, samples and seed"),
    ):
        with pytest.raises(DataError, match=f"don't have the same {re.escape(what)}"):
            compare_missing_metadata(first, other)


@pytest.mark.parametrize("shares", [(), (0.5,), (1.0, 1.0), (0.5, 0.2, 1.0), (-0.1, 1.0), (0.0, 1.5)])
def test_shares_must_ascend_to_one(opened: OpenedRun, shares: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="ascend within"):
        measure_missing_metadata(opened, shares)


def test_patterns_are_those_of_training_and_those_of_the_schema() -> None:
    fields = (
        MetadataField(name="age", kind="numeric", tier="M1", subgroup=True),
        MetadataField(name="sex", kind="boolean", subgroup=True),
        MetadataField(name="itch", kind="boolean", tier="M1"),
        MetadataField(name="smoke", kind="boolean"),
    )
    schema = DatasetSchema(name="x", title="X", classes=("A", "B"), fields=fields)
    rows = pd.DataFrame({"age": 1.0, "sex": "True", "itch": "True", "smoke": "True"}, index=range(200)).astype(
        {"sex": object, "smoke": object}
    )
    rows.loc[:59, ["sex", "smoke"]] = np.nan
    rows.loc[60:89, "smoke"] = np.nan
    rows.loc[90, "itch"] = np.nan
    found = {pattern.removed: pattern for pattern in find_patterns(rows, schema)}
    assert list(found) == [(), ("smoke",), ("sex", "smoke"), ("itch", "smoke"), ("age", "sex", "itch", "smoke")]
    assert [pattern.training_share for pattern in found.values()][:3] == [109 / 200, 30 / 200, 60 / 200]
    assert found["smoke",].name == "1 field missing: smoke"
    assert found["sex", "smoke"].name == "2 fields missing: sex, smoke (only the always recorded fields, M1)"
    assert found["itch", "smoke"].name == "only age, sex"
    assert np.isnan(found["itch", "smoke"].training_share)
    assert found["age", "sex", "itch", "smoke"].name == NO_FIELDS


def test_patterns_of_many_fields_are_cut_short_but_told_apart() -> None:
    names = ["a", "b", "c", "d", "e"]
    schema = DatasetSchema(
        name="x",
        title="X",
        classes=("A", "B"),
        fields=tuple(MetadataField(name=name, kind="boolean") for name in names),
    )
    rows = pd.DataFrame("True", index=range(30), columns=names)
    rows.loc[:9, ["a", "b", "c", "d"]] = np.nan
    shown = [pattern.name for pattern in find_patterns(rows, schema)]
    assert shown == [ALL_FIELDS, "4 fields missing: a, b, c, ...", NO_FIELDS]
    rows.loc[10:14, ["a", "b", "c", "e"]] = np.nan
    shown = [pattern.name for pattern in find_patterns(rows, schema)]
    assert shown == [ALL_FIELDS, "4 fields missing: a, b, c, d", "4 fields missing: a, b, c, e", NO_FIELDS]


def test_tables_print_what_was_measured(made: dict[str, MissingMetadata], real: MissingMetadata) -> None:
    table = missing_metadata_table(real)
    assert [row[0].text for row in table.rows] == ["0%", "50%", "100%"]
    assert table.columns == ("values kept", "mean number", WITH_IMAGE, WITHOUT_IMAGE)
    assert [row[2].text for row in table.rows] == [f"{value:.3f}" for value in balanced(real, WITH_IMAGE)]
    patterns = missing_pattern_table(made["picture"])
    assert patterns.columns[-1] == WITH_IMAGE
    assert patterns.rows[0][0].text == ALL_FIELDS
    differences = missing_difference_table(compare_missing_metadata(made["centre"], made["form"]), "centre", "form")
    texts = [row[0].text for row in differences.rows]
    assert len(set(texts)) == len(texts)
    assert differences.rows[texts.index(f"{WITH_IMAGE}, 0% of the values")][3].text == "+0.833"
    assert not any(NO_FIELDS in text for text in texts)


def availability(name: str, photographs: tuple[str, ...] = (WITH_IMAGE, WITHOUT_IMAGE)) -> MissingMetadata:
    """Return curves and patterns with numbers that are made up."""
    numbers = {"value": 0.5, "low": 0.4, "high": 0.6, "difference": 0.0, "difference_low": -0.1, "difference_high": 0.1}
    long = "7 fields missing: background_father, background_mother, skin_cancer_history, ... (only the always recorded fields, M1)"
    patterns = [("all answers that are there", "", 0.6), (long, "a; b", 0.3), ("no form", "a; b; c", np.nan)]
    curve = [
        {"photograph": photograph, "share": share, "answers_kept": 20 * share, "draws": 5, "measure": measure}
        | numbers
        | {"value": 0.2 + share / 2}
        for photograph in photographs
        for share in (0.0, 0.5, 1.0)
        for measure in MEASURES[:2]
    ]
    named = [
        {
            "photograph": photograph,
            "pattern": pattern,
            "removed": removed,
            "training_share": share,
            "answers_kept": 9.0,
            "measure": measure,
        }
        | numbers
        for photograph in photographs
        for pattern, removed, share in patterns
        for measure in MEASURES[:2]
    ]
    bootstrap = PooledBootstrap({}, {}, 3, 4, 100, 0.95)
    return MissingMetadata(
        name,
        pd.DataFrame(curve),
        pd.DataFrame(named),
        1 / 6,
        bootstrap,
        ("1", "2", "3", "4"),
        ("a", "a", "b", "c"),
        21,
        "patient",
        5,
        100,
        0,
    )


@pytest.mark.parametrize("measure", MEASURES[:2])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_curves_and_patterns_of_runs_can_be_read(count: int, measure: str) -> None:
    kinds = [(WITH_IMAGE, WITHOUT_IMAGE), (WITH_IMAGE,), (WITHOUT_IMAGE,), (WITH_IMAGE, WITHOUT_IMAGE)]
    made = [availability(f"a run with a long name {number}", kinds[number]) for number in range(count)]
    curves, patterns = draw_missing_metadata(made, measure), draw_missing_patterns(made, measure)
    for picture in (curves, patterns):
        assert_readable(picture)
        assert set(picture.data["run"]) == {one.name for one in made}
        assert set(picture.data["measure"]) == {measure}
    assert len(curves.figure.axes) == (1 if count == 1 else 2)
    lines = [line for axis in curves.figure.axes for line in axis.lines if len(line.get_xdata()) == 3]
    assert len(lines) == sum(len(kind) for kind in kinds[:count])
    assert all(list(line.get_ydata()) == [0.2, 0.45, 0.7] for line in lines)


def test_too_many_runs_are_refused() -> None:
    made = [availability(str(number)) for number in range(5)]
    for draw in (draw_missing_metadata, draw_missing_patterns):
        with pytest.raises(ValueError, match="1 to 4 runs"):
            draw(made)
        with pytest.raises(ValueError, match="1 to 4 runs"):
            draw([])
