from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dualrefnet.analysis.opened_run import OpenedRun, open_run
from dualrefnet.analysis.perturbations import (
    count_flags,
    find_missing,
    hide_flags,
    permute_across_groups,
    predict_with_metadata,
    predict_without_image,
    replace_values,
    without_fields,
)
from dualrefnet.analysis.shortcuts import (
    Shortcuts,
    fit_baseline,
    probe_shortcuts,
    shortcut_sentences,
    shortcut_table,
    with_missing_indicators,
)
from dualrefnet.errors import DataError
from dualrefnet.evaluation.comparison import paired_difference
from dualrefnet.evaluation.metrics import compute_metrics
from dualrefnet.run import Run
from hand_made import FormOnly, PictureOnly, hand_made

CHANCE = 1 / 6


@pytest.fixture(scope="module")
def opened(tiny_run: Run) -> OpenedRun:
    return open_run(tiny_run, device=torch.device("cpu"))


@pytest.fixture(scope="module")
def real(opened: OpenedRun) -> Shortcuts:
    return probe_shortcuts(opened, permutations=2, samples=50)


def probe(opened: OpenedRun, folder: Path, looks_at: str, **options: object) -> pd.DataFrame:
    """Return the balanced accuracy of every probe of a hand-made run."""
    result = probe_shortcuts(hand_made(opened, folder / looks_at, looks_at, **options), permutations=3, samples=40)  # type: ignore[arg-type]
    table = result.table[result.table["measure"] == "balanced_accuracy"].set_index("probe")
    assert table.loc["whole", "value"] == 1, "the hand-made model knows the answer"
    return table


def groups_of(opened: OpenedRun) -> np.ndarray:
    return opened.groups.loc[list(opened.rows("test")["image_id"])].to_numpy()


@given(st.lists(st.integers(0, 5), min_size=2, max_size=40), st.integers(0, 100))
def test_strangers_are_of_another_patient_each_and_all_are_given_once(groups: list[int], seed: int) -> None:
    largest = max(groups.count(group) for group in groups)
    if len(set(groups)) < 2:
        return
    if 2 * largest > len(groups):
        with pytest.raises(DataError, match="more than half"):
            permute_across_groups(groups, np.random.default_rng(seed))
        return
    given_rows = permute_across_groups(groups, np.random.default_rng(seed))
    assert sorted(given_rows.tolist()) == list(range(len(groups)))
    assert all(groups[row] != groups[other] for row, other in enumerate(given_rows))


def test_strangers_come_from_everywhere() -> None:
    drawn = np.stack([permute_across_groups([0, 0, 1, 2, 3], np.random.default_rng(seed)) for seed in range(300)])
    assert set(drawn[:, 0].tolist()) == {2, 3, 4}
    assert set(drawn[:, 3].tolist()) == {0, 1, 2, 4}


def test_a_model_of_gaps_keeps_all_with_gaps_alone_and_nothing_without_flags(opened: OpenedRun, tmp_path: Path) -> None:
    table = probe(opened, tmp_path, "flags")
    for name in (
        "no_photograph",
        "other_photographs",
        "gaps",
        "photograph_and_gaps",
        "trained_gaps",
        "lesion_blurred",
        "background_only",
    ):
        assert table.loc[name, "value"] == 1, name
        assert table.loc[name, "lead"] == 1, name
        assert table.loc[name, "difference"] == 0, name
    # All flags down: all classes are equally likely, and the first is said. With a form without answers all are up.
    assert table.loc["flags_hidden", "value"] == table.loc["no_form", "value"] == pytest.approx(CHANCE)
    assert table.loc["flags_hidden", "lead"] == pytest.approx(0)
    assert table.loc["other_forms", "value"] < 0.4


def test_a_model_of_answers_keeps_all_with_the_form_alone_and_nothing_with_the_gaps(
    opened: OpenedRun, tmp_path: Path
) -> None:
    table = probe(opened, tmp_path, "age")
    for name in ("no_photograph", "other_photographs", "flags_hidden", "background_only", "lesion_only"):
        assert table.loc[name, "value"] == 1, name
    for name in ("gaps", "photograph_and_gaps", "other_forms", "background_alone", "lesion_alone"):
        assert table.loc[name, "value"] < 0.4, name
    assert table.loc["no_form", "value"] < 0.4


def test_a_model_of_the_lesion_and_one_of_the_background_are_told_apart(opened: OpenedRun, tmp_path: Path) -> None:
    lesion, background = (probe(opened, tmp_path, place) for place in ("centre", "corner"))
    for table in (lesion, background):
        for name in ("no_form", "other_forms", "photograph_and_gaps", "flags_hidden"):
            assert table.loc[name, "value"] == 1, name
        # What stands for no photograph is of one colour.
        assert table.loc["no_photograph", "value"] == pytest.approx(CHANCE)
        assert table.loc["other_photographs", "value"] < 0.4
    assert lesion.loc[["lesion_only", "lesion_alone"], "value"].tolist() == [1, 1]
    assert lesion.loc[["background_only", "background_alone"], "value"].tolist() == pytest.approx([CHANCE, CHANCE])
    assert background.loc[["lesion_only", "lesion_alone"], "value"].tolist() == pytest.approx([CHANCE, CHANCE])
    assert background.loc[["lesion_blurred", "background_only", "background_alone"], "value"].tolist() == [1, 1, 1]


def test_pictures_and_forms_meet_only_as_they_were_or_across_patients(opened: OpenedRun, tmp_path: Path) -> None:
    # The picture spells its row, and so does the age.
    run = hand_made(opened, tmp_path / "run", "centre", ages=False)
    probe_shortcuts(run, permutations=3, samples=20)
    patients = run.groups.loc[list(run.dataset.table["image_id"])].to_numpy()
    rows = set(run.dataset.table.index[run.dataset.table["image_id"].isin(run.rows("test")["image_id"])])
    exchanged = 0
    for picture, age in run.model.pairs:  # type: ignore[union-attr]
        if picture in rows and age in rows and picture != age:
            exchanged += 1
            # The age that the imputer writes into an empty form is an answer of nobody.
            assert patients[picture] != patients[age] or age == empty_age(run), (picture, age)
    assert exchanged > 3 * len(rows)


def empty_age(run: OpenedRun) -> int:
    rows = run.rows("test")
    values = run.metadata.encode(without_fields(rows, [field.name for field in run.metadata.fields])).values
    place = [field.name for field in run.metadata.fields].index("age")
    return round(float(values[0, run.metadata.names.index("age")] * run.metadata.std[place] + run.metadata.mean[place]))


def test_replaced_answers_are_those_of_others_and_gaps_stay(opened: OpenedRun) -> None:
    rows, metadata, groups = opened.rows("test"), opened.metadata, groups_of(opened)
    # Each row's age is its own, so that the donor is known.
    rows = rows.assign(age=np.arange(len(rows), dtype=float))
    replaced = replace_values(rows, metadata, groups, np.random.default_rng(0))
    donors = replaced["age"].to_numpy().astype(int)
    assert (groups[donors] != groups).all()
    for before, after in zip(find_missing(rows, metadata), find_missing(replaced, metadata), strict=True):
        np.testing.assert_array_equal(before, after)
    missing, not_known = find_missing(rows, metadata)
    assert missing.any()
    assert not_known.any()
    for index, field in enumerate(metadata.fields):
        answers = rows[field.name][~missing[:, index] & ~not_known[:, index]]
        given_answers = replaced[field.name][~missing[:, index] & ~not_known[:, index]]
        assert set(given_answers) <= set(answers)
    assert replaced["label"].equals(rows["label"])


def test_an_answer_that_only_one_patient_gave_is_taken_away(opened: OpenedRun) -> None:
    rows = opened.rows("test").assign(smoke=np.nan)
    rows["smoke"] = rows["smoke"].astype(object)
    rows.loc[0, "smoke"] = "True"
    replaced = replace_values(rows, opened.metadata, groups_of(opened), np.random.default_rng(0))
    assert replaced["smoke"].isna().all()


def test_hidden_flags_change_nothing_but_the_flags(opened: OpenedRun) -> None:
    forms = opened.metadata.encode(opened.rows("test")).values
    flags = [index for index, name in enumerate(opened.metadata.names) if name.startswith("missing_")]
    hidden = hide_flags(opened.metadata, forms)
    assert count_flags(opened.metadata) == len(flags) > 0
    assert forms[:, flags].any()
    assert not hidden[:, flags].any()
    np.testing.assert_array_equal(np.delete(hidden, flags, axis=1), np.delete(forms, flags, axis=1))


def test_the_whole_is_what_the_run_predicted_and_differences_are_paired(opened: OpenedRun, real: Shortcuts) -> None:
    examples = opened.pictures("test")
    written = opened.run.predictions.query("split == 'test'")[[f"prob_{name}" for name in opened.classes]].to_numpy()
    empty = opened.metadata.encode(
        without_fields(opened.rows("test"), [field.name for field in opened.metadata.fields])
    ).values
    asked = predict_with_metadata(opened, examples, [examples.metadata, empty])
    np.testing.assert_allclose(asked.answers[0], written, atol=1e-5)
    assert asked.vectors.shape == (len(examples), opened.model.encoder.features)
    values = real.table.set_index(["probe", "measure"])
    for measure, key in (("balanced_accuracy", "balanced_accuracy"), ("auc_macro_ovr", "auc_macro_ovr")):
        metrics = compute_metrics(examples.labels, asked.answers[1], opened.classes)
        assert values.loc[("no_form", measure), "value"] == pytest.approx(metrics[key])
    # An independent road to the same interval.
    pair = paired_difference(
        examples.labels,
        asked.answers[1],
        asked.answers[0],
        groups_of(opened),
        opened.classes,
        "auc_macro_ovr",
        samples=50,
    )
    row = values.loc[("no_form", "auc_macro_ovr")]
    assert row["difference"] == pytest.approx(pair.value)
    assert [row["difference_low"], row["difference_high"]] == pytest.approx([pair.low, pair.high])


def test_without_photograph_is_one_answer_for_equal_forms_in_batches_of_any_size(opened: OpenedRun) -> None:
    forms = opened.pictures("test").metadata
    size = opened.recipe.evaluation.batch_size
    small = opened.recipe.model_copy(
        update={"evaluation": opened.recipe.evaluation.model_copy(update={"batch_size": 7})}
    )
    assert len(forms) % 7
    assert len(forms) < size
    first, second = (predict_without_image(run, [forms])[0] for run in (opened, replace(opened, recipe=small)))
    np.testing.assert_allclose(first, second, atol=1e-6)
    doubled = predict_without_image(opened, [np.repeat(forms[:1], 3, axis=0)])[0]
    np.testing.assert_allclose(doubled, np.repeat(first[:1], 3, axis=0), atol=1e-6)


def test_probes_that_make_no_sense_are_left_out_and_said_so(opened: OpenedRun, tmp_path: Path) -> None:
    form = probe_shortcuts(hand_made(opened, tmp_path / "form", "age", FormOnly), permutations=2, samples=20)
    assert set(form.table["probe"]) == {"whole", "gaps", "flags_hidden", "trained_form", "trained_gaps"}
    assert any("reads no photograph" in remark for remark in form.remarks)
    picture = probe_shortcuts(
        hand_made(opened, tmp_path / "picture", "corner", PictureOnly), permutations=2, samples=20
    )
    assert set(picture.table["probe"]) == {
        *("whole", "trained_photograph", "whole_outlined", "lesion_blurred", "background_only", "lesion_only")
    }
    assert any("reads no form" in remark for remark in picture.remarks)
    run = hand_made(opened, tmp_path / "bare", "corner")
    for path in (tmp_path / "bare" / "masks").iterdir():
        path.unlink()
    (tmp_path / "bare" / "masks").rmdir()
    bare = probe_shortcuts(run, permutations=2, samples=20)
    assert "whole_outlined" not in set(bare.table["probe"])
    assert any("no outlines" in remark for remark in bare.remarks)
    with pytest.raises(DataError, match="there is no folder of masks"):
        probe_shortcuts(run, tmp_path / "nowhere", permutations=2, samples=20)


def test_a_lead_that_can_t_be_told_from_none_is_not_shared_out(opened: OpenedRun, tmp_path: Path) -> None:
    # The pictures hold the answer where the model doesn't look.
    run = hand_made(opened, tmp_path / "run", "centre")
    blind = np.memmap(tmp_path / "run" / "images.u8", dtype=np.uint8, mode="r+")
    blind[:] = 60
    blind.flush()
    result = probe_shortcuts(run, permutations=2, samples=30)
    table = result.table[result.table["measure"] == "balanced_accuracy"]
    assert table["lead"].isna().all()
    assert table.set_index("probe").loc["whole", "value"] == pytest.approx(CHANCE)
    assert "can't be told from none" in shortcut_sentences(result)[0]
    assert shortcut_table(result).rows[1][2].text == "–"


def test_the_table_says_what_was_measured(real: Shortcuts) -> None:
    table, printed = real.table, shortcut_table(real)
    asked = table[~table["trained"]].drop_duplicates("probe")
    assert [row[0].text for row in printed.rows] == asked["input"].tolist()
    values = table[table["measure"] == "balanced_accuracy"].set_index("probe")
    for row, name, trained in zip(printed.rows, asked["probe"], asked["trained_probe"], strict=True):
        assert row[1].text == f"{values.loc[name, 'value']:.3f}"
        assert row[-1].text == (f"{values.loc[trained, 'value']:.3f}" if trained else "–")
    assert not any("{" in cell.text for row in printed.rows for cell in row)
    assert "0.167" in printed.notes[0]


def test_a_regression_learns_what_is_there_and_only_that() -> None:
    generator = np.random.default_rng(0)
    labels = np.repeat([0, 2], 40)
    train = np.stack([labels + generator.normal(0, 0.1, 80), np.ones(80)], axis=1).astype(np.float32)
    found = fit_baseline(train, labels, np.array([[0, 1], [2, 1]], np.float32), 3)
    assert found.argmax(axis=1).tolist() == [0, 2]
    assert (found[:, 1] == 0).all()
    np.testing.assert_allclose(found.sum(axis=1), 1)
    noise = fit_baseline(
        generator.normal(size=(80, 2)).astype(np.float32), labels, generator.normal(size=(400, 2)).astype(np.float32), 3
    )
    assert noise.max() < 0.9


def test_gaps_of_encoded_forms_become_columns() -> None:
    train, test = np.array([[1, np.nan], [2, 3]], np.float32), np.array([[np.nan, 5]], np.float32)
    first, second = with_missing_indicators(train, test)
    np.testing.assert_array_equal(first, [[1, 0, 0, 1], [2, 3, 0, 0]])
    np.testing.assert_array_equal(second, [[0, 5, 1, 0]])
