"""Shortcut probes: of hand-made models what each probe reaches is known."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

from dualrefnet.analysis.opened_run import OpenedRun, open_run
from dualrefnet.analysis.perturbations import (
    predict_with_metadata,
    without_fields,
)
from dualrefnet.analysis.shortcuts import (
    BASELINES,
    MEASURES,
    PROBES,
    Shortcuts,
    draw_shortcuts,
    fit_baseline,
    probe_shortcuts,
    shortcut_sentences,
    shortcut_table,
    with_missing_indicators,
)
from dualrefnet.cli import app, runs  # noqa: F401 (the module registers the commands)
from dualrefnet.display.figure import save_figure
from dualrefnet.errors import DataError, RunError
from dualrefnet.evaluation.comparison import paired_difference
from dualrefnet.evaluation.metrics import compute_metrics
from dualrefnet.report.run_report import write_probes
from dualrefnet.run import Run
from hand_made import FormOnly, PictureOnly, hand_made
from readable import assert_readable

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


def test_the_whole_is_what_the_run_predicted_and_differences_are_paired(opened: OpenedRun, real: Shortcuts) -> None:
    examples = opened.image_examples("test")
    written = opened.run.predictions.query("split == 'test'")[[f"prob_{name}" for name in opened.classes]].to_numpy()
    empty = opened.metadata.encode(
        without_fields(opened.rows("test"), [field.name for field in opened.metadata.fields])
    ).values
    asked = predict_with_metadata(opened, examples, [examples.metadata, empty])
    np.testing.assert_allclose(asked.probabilities[0], written, atol=1e-5)
    assert asked.vectors.shape == (len(examples), opened.model.encoder.features)
    values = real.table.set_index(["probe", "measure"])
    for measure, key in (("balanced_accuracy", "balanced_accuracy"), ("auc_macro_ovr", "auc_macro_ovr")):
        metrics = compute_metrics(examples.labels, asked.probabilities[1], opened.classes)
        assert values.loc[("no_form", measure), "value"] == pytest.approx(metrics[key])
    # An independent road to the same interval.
    pair = paired_difference(
        examples.labels,
        asked.probabilities[1],
        asked.probabilities[0],
        groups_of(opened),
        opened.classes,
        "auc_macro_ovr",
        samples=50,
    )
    row = values.loc[("no_form", "auc_macro_ovr")]
    assert row["difference"] == pytest.approx(pair.value)
    assert [row["difference_low"], row["difference_high"]] == pytest.approx([pair.low, pair.high])


def test_probes_that_make_no_sense_are_left_out_and_said_so(opened: OpenedRun, tmp_path: Path) -> None:
    form = probe_shortcuts(hand_made(opened, tmp_path / "form", "age", FormOnly), permutations=2, samples=20)
    assert set(form.table["probe"]) == {"whole", "gaps", "flags_hidden", "trained_form", "trained_gaps"}
    assert any("reads no image" in remark for remark in form.remarks)
    picture = probe_shortcuts(
        hand_made(opened, tmp_path / "picture", "corner", PictureOnly), permutations=2, samples=20
    )
    assert set(picture.table["probe"]) == {
        *("whole", "trained_photograph", "whole_outlined", "lesion_blurred", "background_only", "lesion_only")
    }
    assert any("reads no metadata" in remark for remark in picture.remarks)
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
    assert "isn't significant" in shortcut_sentences(result)[0]
    assert shortcut_table(result).rows[1][2].text == "–"


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


def shortcuts(unit: str = "patient") -> Shortcuts:
    """Return probes of all kinds, with numbers that are made up."""
    rows = []
    for place, name in enumerate([*PROBES, *BASELINES]):
        given, trained = PROBES.get(name, (BASELINES.get(name, ""), ""))
        for measure in MEASURES:
            value = 0.7 - 0.02 * place
            row: dict[str, object] = {
                "probe": name,
                "input": given.format(unit=unit),
                "trained": name in BASELINES,
                "trained_probe": trained,
            }
            row |= {"compared_with": "whole", "measure": measure, "chance": 1 / 6 if measure == MEASURES[0] else 0.5}
            row |= {
                "value": value,
                "low": value - 0.05,
                "high": value + 0.06,
                "difference": value - 0.7,
                "difference_low": -0.1,
            }
            row |= {"difference_high": 0.1, "lead": 1 - 0.04 * place, "lead_low": 0.1, "lead_high": 0.9}
            rows.append(row | {"images": 200, "patients": 147, "repeats": 1})
    return Shortcuts(pd.DataFrame(rows), ("one was left out",), "DualRefNet", unit, 10, 627, 1000, 0)


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("unit", ["patient", "lesion"])
def test_all_probes_are_drawn_and_can_be_read(measure: str, unit: str) -> None:
    made = shortcuts(unit)
    picture = draw_shortcuts(made, measure)
    assert_readable(picture)
    assert len(picture.data) == len(PROBES) + len(BASELINES)
    dots = [
        line for line in picture.figure.axes[0].lines if line.get_marker() in ("o", "s") and len(line.get_xdata()) == 1
    ]
    drawn = made.table[(made.table["measure"] == measure) & ~made.table["trained"]]
    assert [line.get_xdata()[0] for line in dots] == drawn["value"].tolist()
    diamonds = [line for line in picture.figure.axes[0].lines if line.get_marker() == "D"]
    assert len(diamonds) == (drawn["trained_probe"] != "").sum()
    assert f"{unit}s" in picture.caption
    assert "{" not in picture.caption + picture.alt


def test_probes_of_one_input_alone_are_drawn(tmp_path: Path) -> None:
    made = shortcuts()
    few = replace(
        made, table=made.table[made.table["probe"].isin(["whole", "gaps", "flags_hidden"])].assign(trained_probe="")
    )
    picture = draw_shortcuts(few)
    assert_readable(picture)
    assert "outline" not in picture.caption
    assert "diamond" not in picture.caption
    assert len(save_figure(picture, tmp_path)) == 3
    with pytest.raises(ValueError, match="have no kappa"):
        draw_shortcuts(made, "kappa")


def test_the_command_leaves_tables_and_pictures(tiny_run: Run, tmp_path: Path) -> None:
    result = CliRunner().invoke(
        app,
        ["probe", str(tiny_run.path), "--out", str(tmp_path), "--permutations", "2", "--draws", "1", "--device", "cpu"],
    )
    assert result.exit_code == 0, result.output
    assert "Shortcut" in result.output
    assert "[0." in result.output, "intervals are printed as they are"
    tables = {f"{name}.csv" for name in ("shortcuts", "availability", "patterns", "subgroups", "out_of_scope")}
    assert {path.name for path in tmp_path.iterdir()} == tables | {"shortcuts.json", "pictures"}
    assert set(pd.read_csv(tmp_path / "subgroups.csv")["field"]) == {"age", "gender", "fitspatrick", "region"}
    assert "test images of lesions" in set(pd.read_csv(tmp_path / "out_of_scope.csv")["group"])
    assert len(list((tmp_path / "pictures").glob("*.png"))) == 3
    table = pd.read_csv(tmp_path / "shortcuts.csv")
    written = json.loads((tmp_path / "shortcuts.json").read_text())
    assert [row["probe"] for row in written["probes"]] == table["probe"].tolist()
    assert written["permutations"] == 2
    assert set(pd.read_csv(tmp_path / "availability.csv")["run"]) == {"tiny"}


def test_what_can_t_be_probed_is_refused_at_once(tiny_run: Run, tmp_path: Path) -> None:
    unfinished = Run(tmp_path / "unfinished")
    with pytest.raises(RunError, match="isn't a finished run"):
        write_probes(unfinished)
    with pytest.raises(RunError, match="compared with itself"):
        write_probes(tiny_run, [tiny_run])
    with pytest.raises(RunError, match="at most 3 times"):
        write_probes(tiny_run, [unfinished] * 4)
    with pytest.raises(RunError, match="isn't a finished run"):
        write_probes(tiny_run, [unfinished])
