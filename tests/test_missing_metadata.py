"""Runs with missing metadata: of hand-made models what is left is known."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from dualrefnet.analysis.missing_metadata import (
    ALL_FIELDS,
    MEASURES,
    NO_FIELDS,
    SHARES,
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
)
from dualrefnet.analysis.opened_run import OpenedRun
from dualrefnet.data.schema import DatasetSchema, MetadataField
from dualrefnet.evaluation.bootstrap import Bootstrap
from dualrefnet.evaluation.metrics import compute_metrics
from hand_made import FormOnly, PictureOnly, hand_made
from readable import assert_readable
from resampling import paired_difference


@pytest.fixture(scope="module")
def real(opened: OpenedRun) -> MissingMetadata:
    return measure_missing_metadata(opened, draws=2, samples=50)


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
    return {name: measure_missing_metadata(run, draws=3, samples=40, name=name) for name, run in runs.items()}


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
        assert values[5] == pytest.approx(np.mean(expected))
        assert values[-1] == 1
        assert values[0] == pytest.approx(1 / 6)
    assert balanced(made["form"], WITHOUT_IMAGE) == balanced(made["age"], WITHOUT_IMAGE)


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
    assert real.curve["draws"].tolist() == [1, 1, *[2] * 18, 1, 1] * 2
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
    labels = opened.image_examples("test").labels
    groups = opened.groups.loc[list(opened.rows("test")["image_id"])].to_numpy()
    # What stands for no photograph has the red of the fifth class.
    right, constant = np.eye(6)[labels], np.eye(6)[np.full(len(labels), 4)]
    pair = paired_difference(labels, right, constant, Bootstrap(groups, 40), opened.classes, "balanced_accuracy")
    row = back.query("share == 1 and photograph == @WITHOUT_IMAGE and measure == 'balanced_accuracy'")
    assert [row["low"].iloc[0], row["high"].iloc[0]] == pytest.approx([pair.low, pair.high])


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


@pytest.mark.parametrize("names", [["age"], ["age", "form"], ["age", "form", "centre", "picture"]])
def test_curves_and_patterns_of_runs_can_be_read(made: dict[str, MissingMetadata], names: list[str]) -> None:
    runs = [made[name] for name in names]
    curves, patterns = draw_missing_metadata(runs), draw_missing_patterns(runs)
    for figure, table in ((curves, "curve"), (patterns, "patterns")):
        assert_readable(figure)
        expected = pd.concat([getattr(run, table) for run in runs]).query("measure == 'balanced_accuracy'")
        assert figure.data["value"].tolist() == expected["value"].tolist()
        assert list(dict.fromkeys(figure.data["run"])) == names
    lines = [line for axis in curves.figure.axes for line in axis.lines if len(line.get_xdata()) == len(SHARES)]
    assert sorted(list(line.get_ydata()) for line in lines) == sorted(
        of_input["value"].tolist() for _, of_input in curves.data.groupby(["run", "photograph"])
    )
    for draw in (draw_missing_metadata, draw_missing_patterns):
        for number in (0, 5):
            with pytest.raises(ValueError, match="1 to 4 runs"):
                draw(runs[:1] * number)
