"""Shortcut probes: of hand-made models what each probe reaches is known."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from dualrefnet.analysis.opened_run import OpenedRun
from dualrefnet.analysis.perturbations import predict_with_metadata, without_fields
from dualrefnet.analysis.shortcuts import BASELINES, PROBES, Shortcuts, draw_shortcuts, probe_shortcuts
from dualrefnet.cli import app, runs  # noqa: F401 (the module registers the commands)
from dualrefnet.display.figure import save_figure
from dualrefnet.errors import DataError
from dualrefnet.evaluation.bootstrap import Bootstrap
from dualrefnet.evaluation.metrics import compute_metrics
from dualrefnet.run import Run
from hand_made import FormOnly, PictureOnly, hand_made
from readable import assert_readable
from resampling import paired_difference

CHANCE = 1 / 6


@pytest.fixture(scope="module")
def real(opened: OpenedRun) -> Shortcuts:
    return probe_shortcuts(opened, permutations=2, samples=50)


def probe(opened: OpenedRun, folder: Path, looks_at: str, **options: object) -> pd.DataFrame:
    """Return the balanced accuracy of every probe of a hand-made run."""
    result = probe_shortcuts(hand_made(opened, folder / looks_at, looks_at, **options), permutations=3, samples=40)  # type: ignore[arg-type]
    table = result.table[result.table["measure"] == "balanced_accuracy"].set_index("probe")
    assert table.loc["whole", "value"] == 1, "the hand-made model knows the answer"
    return table


def test_a_model_of_gaps_keeps_all_with_gaps_alone_and_nothing_without_flags(opened: OpenedRun, tmp_path: Path) -> None:
    table = probe(opened, tmp_path, "flags")
    kept = ["no_photograph", "other_photographs", "gaps", "photograph_and_gaps", "trained_gaps"]
    for name in [*kept, "lesion_blurred", "background_only"]:
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
    for measure in ("balanced_accuracy", "auc_macro_ovr"):
        metrics = compute_metrics(examples.labels, asked.probabilities[1], opened.classes)
        assert values.loc[("no_form", measure), "value"] == pytest.approx(metrics[measure])
    # An independent road to the same interval.
    groups = opened.groups.loc[list(opened.rows("test")["image_id"])].to_numpy()
    pair = paired_difference(
        examples.labels, *asked.probabilities[::-1], Bootstrap(groups, 50), opened.classes, "auc_macro_ovr"
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


def test_all_probes_are_drawn_and_can_be_read(real: Shortcuts, tmp_path: Path) -> None:
    figure = draw_shortcuts(real)
    assert_readable(figure)
    assert set(figure.data["probe"]) == set(PROBES) | set(BASELINES)
    drawn = real.table[(real.table["measure"] == "balanced_accuracy") & ~real.table["trained"]]
    lines = figure.figure.axes[0].lines
    dots = [line for line in lines if line.get_marker() in ("o", "s") and len(line.get_xdata()) == 1]
    assert [line.get_xdata()[0] for line in dots] == drawn["value"].tolist()
    assert sum(line.get_marker() == "D" for line in lines) == (drawn["trained_probe"] != "").sum()
    table = real.table[real.table["probe"].isin(["whole", "gaps", "flags_hidden"])].assign(trained_probe="")
    few = draw_shortcuts(replace(real, table=table))
    assert_readable(few)
    assert len(save_figure(few, tmp_path)) == 3


def test_the_command_leaves_tables_and_pictures(tiny_run: Run, tmp_path: Path) -> None:
    options = ["--out", str(tmp_path), "--permutations", "2", "--draws", "1", "--device", "cpu"]
    result = CliRunner().invoke(app, ["probe", str(tiny_run.path), *options])
    assert result.exit_code == 0, result.output
    tables = {f"{name}.csv" for name in ("shortcuts", "availability", "patterns", "subgroups", "out_of_scope")}
    assert {path.name for path in tmp_path.iterdir()} == tables | {"shortcuts.json", "pictures"}
    assert set(pd.read_csv(tmp_path / "subgroups.csv")["field"]) == {"age", "gender", "fitspatrick", "region"}
    assert "test images of lesions" in set(pd.read_csv(tmp_path / "out_of_scope.csv")["group"])
    assert len(list((tmp_path / "pictures").glob("*.png"))) == 3
    table = pd.read_csv(tmp_path / "shortcuts.csv")
    written = json.loads((tmp_path / "shortcuts.json").read_text())
    assert [row["probe"] for row in written["probes"]] == table["probe"].tolist()
    # What is printed are the numbers of the files.
    whole = table.query("probe == 'whole' and measure == 'balanced_accuracy'").iloc[0]
    assert f"{whole['value']:.3f} [{whole['low']:.2f}, {whole['high']:.2f}]" in result.output
    assert written["permutations"] == 2
    assert set(pd.read_csv(tmp_path / "availability.csv")["run"]) == {"tiny"}
