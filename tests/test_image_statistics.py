"""Classes of a split, and brightness and colour cast before and after preprocessing."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from skimage.color import rgb2lab
from typer.testing import CliRunner

from dualrefnet.analysis.image_statistics import (
    STAGES,
    colour_statistics,
    draw_class_counts,
    draw_statistics,
    measure_images,
    statistics_table,
    summarise,
)
from dualrefnet.analysis.opened_run import OpenedRun
from dualrefnet.cli import app, data  # noqa: F401 (the module registers the commands)
from dualrefnet.errors import DataError
from dualrefnet.files import read_json
from dualrefnet.recipe import ImageSection
from dualrefnet.report import ReportOptions
from dualrefnet.report.trust import images_section
from readable import assert_readable

PINK, GREY = (220, 150, 140), (128, 128, 128)


def plain(colour: tuple[int, int, int]) -> np.ndarray:
    return np.full((80, 100, 3), colour, dtype=np.uint8)


@pytest.fixture
def table(tmp_path: Path) -> pd.DataFrame:
    """Two pink images of class A, a grey one of B, and a file that is no image."""
    rows = []
    for name, label, colour in (("a1", "A", PINK), ("a2", "A", (200, 130, 120)), ("b1", "B", GREY)):
        Image.fromarray(plain(colour)).save(tmp_path / f"{name}.png")
        rows.append((name, label, str(tmp_path / f"{name}.png")))
    (tmp_path / "b2.png").write_text("no image")
    return pd.DataFrame([*rows, ("b2", "B", str(tmp_path / "b2.png"))], columns=["image_id", "label", "image_path"])


def test_brightness_and_cast_are_those_of_the_mean_colour() -> None:
    lightness, a, b = rgb2lab(np.array(PINK)[None, None] / 255)[0, 0]
    # OpenCV interpolates the cube root.
    assert colour_statistics(plain(PINK)) == pytest.approx((lightness, np.hypot(a, b)), abs=0.15)
    assert colour_statistics(plain(GREY)) == pytest.approx((53.6, 0), abs=0.1)
    # A cast is of the mean: equal parts of opposite colours have none.
    lab = rgb2lab(np.array([[[255, 0, 0], [0, 255, 255]]]) / 255)[0]
    halves = np.concatenate([plain((255, 0, 0)), plain((0, 255, 255))])
    assert colour_statistics(halves)[1] == pytest.approx(np.hypot(*lab[:, 1:].mean(axis=0)), abs=0.5)


def test_shades_of_gray_takes_the_cast_away_and_clahe_leaves_it(table: pd.DataFrame) -> None:
    measured = measure_images(table, ImageSection(), workers=2)
    assert measured["image_id"].value_counts().to_dict() == {"a1": 3, "a2": 3, "b1": 3}
    rows = measured.set_index(["image_id", "stage"])
    assert rows.loc[("a1", "recorded"), "cast"] > 25
    assert rows.loc[("a1", "shades_of_gray"), "cast"] < 1
    assert rows.loc[("a1", "clahe"), "cast"] < 1.5
    assert rows.loc[("b1", "recorded"), "brightness"] == pytest.approx(53.6, abs=0.1)
    summary = summarise(measured, ["A", "B"]).set_index(["class", "stage"])
    both = [colour_statistics(plain(colour))[0] for colour in (PINK, (200, 130, 120))]
    first = summary.loc[("A", "recorded")]
    assert (first["images"], first["brightness_mean"]) == (2, pytest.approx(np.mean(both)))
    assert first["brightness_std"] == pytest.approx(np.std(both, ddof=1))
    assert summary.loc[("all", "recorded"), "images"] == 3
    printed = statistics_table(measured, ["A", "B"])
    assert [[cell.text for cell in row][:2] for row in printed.rows] == [["A", "2"], ["B", "1"], ["all", "3"]]
    assert len(printed.columns) == 2 + 2 * len(STAGES)
    # Without preprocessing there is only what was recorded.
    raw = measure_images(table, ImageSection(colour_constancy="none", clahe=False))
    assert set(raw["stage"]) == {"recorded"}
    with pytest.raises(DataError, match="no image can be read"):
        measure_images(table[3:], ImageSection())


def test_figures_show_the_counts_and_every_image(table: pd.DataFrame, opened: OpenedRun) -> None:
    counts = draw_class_counts(opened.split, opened.classes)
    expected = opened.split.groupby(["label", "split"]).size()
    for row in counts.data.to_dict("records"):
        assert [row[part] for part in ("train", "val", "test")] == [
            expected.get((row["class"], part), 0) for part in ("train", "val", "test")
        ]
    heights = [patch.get_height() for patch in counts.figure.axes[0].patches]
    assert sorted(heights) == sorted(counts.data[["train", "val", "test"]].to_numpy().ravel().tolist())
    drawn = draw_statistics(measure_images(table, ImageSection()), ["A", "B", "C"])
    assert len(drawn.data) == 9
    for figure in (counts, drawn):
        assert_readable(figure)
    section = images_section(opened, ReportOptions(images=30))
    (measured,) = [figure for figure in section.figures if figure.name == "image_statistics"]
    assert measured.data["image_id"].nunique() == 30


def test_check_writes_them_for_every_image(sample_root: Path, tmp_path: Path) -> None:
    command = ["check", "sample", "--root", str(sample_root), "--csv", str(tmp_path / "images.csv")]
    result = CliRunner().invoke(app, [*command, "--out", str(tmp_path / "check.json")])
    assert result.exit_code == 0, result.output
    measured = pd.read_csv(tmp_path / "images.csv")
    assert measured.groupby("stage")["image_id"].nunique().to_dict() == dict.fromkeys(STAGES, 120)
    written = read_json(tmp_path / "check.json")["image_statistics"]
    whole = next(row for row in written if (row["class"], row["stage"]) == ("all", "recorded"))
    recorded = measured[measured["stage"] == "recorded"]
    assert whole["cast_mean"] == pytest.approx(recorded["cast"].mean())
