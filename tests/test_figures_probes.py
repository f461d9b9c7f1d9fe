import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

pytest.importorskip("matplotlib")

from typer.testing import CliRunner

from dualrefnet.analysis.missing_metadata import (
    WITH_IMAGE,
    WITHOUT_IMAGE,
    MissingMetadata,
    draw_missing_metadata,
    draw_missing_patterns,
)
from dualrefnet.analysis.shortcuts import (
    BASELINES,
    MEASURES,
    PROBES,
    Shortcuts,
    draw_shortcuts,
)
from dualrefnet.cli import app, runs  # noqa: F401 (the module registers the commands)
from dualrefnet.display.figure import save_figure
from dualrefnet.errors import RunError
from dualrefnet.evaluation.comparison import PooledBootstrap
from dualrefnet.report.run_report import write_probes
from dualrefnet.report.trust import missing_metadata_section, shortcuts_section
from dualrefnet.run import Run
from readable import assert_readable


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


def availability(name: str, photographs: tuple[str, ...] = (WITH_IMAGE, WITHOUT_IMAGE)) -> MissingMetadata:
    """Return curves and patterns with numbers that are made up."""
    numbers = {"value": 0.5, "low": 0.4, "high": 0.6, "difference": 0.0, "difference_low": -0.1, "difference_high": 0.1}
    long = "7 fields missing: background_father, background_mother, skin_cancer_history, ... (only what is always recorded, M1)"
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


def test_sections_say_in_words_what_is_left() -> None:
    section = shortcuts_section(shortcuts())
    # Of "gaps", the sixth: 1 - 5 * 0.04.
    assert "80% [10% to 90%] when it is given nothing but which answers are missing" in section.intro[0]
    assert [picture.name for picture in section.pictures] == ["shortcuts"]
    other = missing_metadata_section(availability("run"))
    assert "0.70 [0.40, 0.60] with all metadata, 0.20 [0.40, 0.60] with no metadata" in other.intro[0]
    assert [picture.name for picture in other.pictures] == ["availability", "patterns"]
    assert "without" not in missing_metadata_section(availability("run", (WITH_IMAGE,))).intro[0]


def test_the_command_leaves_tables_and_pictures(tiny_run: Run, tmp_path: Path) -> None:
    result = CliRunner().invoke(
        app,
        ["probe", str(tiny_run.path), "--out", str(tmp_path), "--permutations", "2", "--draws", "1", "--device", "cpu"],
    )
    assert result.exit_code == 0, result.output
    assert "How much of the score is shortcut?" in result.output
    assert "[0." in result.output, "intervals are printed as they are"
    tables = {f"{name}.csv" for name in ("shortcuts", "availability", "patterns", "subgroups", "out_of_scope")}
    assert {path.name for path in tmp_path.iterdir()} == tables | {"shortcuts.json", "pictures"}
    assert set(pd.read_csv(tmp_path / "subgroups.csv")["field"]) == {"age", "gender", "fitspatrick", "region"}
    assert "test photographs of lesions" in set(pd.read_csv(tmp_path / "out_of_scope.csv")["group"])
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
