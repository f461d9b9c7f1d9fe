import dataclasses
import re

import numpy as np
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex

from dualrefnet.analysis.embedding import (
    MEASURES,
    EmbeddingComparison,
    Features,
    draw_embedding,
    draw_separation,
    embed_features,
)
from dualrefnet.display.figure import PRIMARY, SECONDARY, WIDTH, class_colours, inline_svg

CLASSES = ("ACK", "BCC", "MEL", "NEV", "SCC", "SEK", "DF", "VASC")
LONG = "pad_ufes_20-dualrefnet-efficientnet_lite0-metadata-auxiliary-R-fold4-seed0"


@pytest.fixture(scope="module")
def comparison() -> EmbeddingComparison:
    labels = np.repeat(np.arange(8), [40, 30, 20, 15, 12, 10, 8, 5])
    generator = np.random.default_rng(0)
    near = generator.normal(size=(140, 12)) + 1.0 * np.eye(12)[labels]
    far = generator.normal(size=(140, 12)) + 9.0 * np.eye(12)[labels]
    ids = tuple(f"image {number}" for number in range(140))
    runs = [
        Features(name, CLASSES, ids, labels, np.arange(140) // 2, values.astype(np.float32))
        for name, values in (("near", near), (LONG, far))
    ]
    return EmbeddingComparison(*embed_features(runs, images=1000, samples=200))


def test_every_image_of_both_runs_is_drawn_in_its_place_and_its_classes_colour(comparison: EmbeddingComparison) -> None:
    picture = draw_embedding(comparison.first, comparison.second)
    colours = class_colours(CLASSES)
    assert len(picture.figure.axes) == 2
    for axis, run in zip(picture.figure.axes, (comparison.first, comparison.second), strict=True):
        assert sorted(str(dots.get_label()) for dots in axis.collections) == sorted(CLASSES)
        for dots in axis.collections:
            name = str(dots.get_label())
            places = run.table.loc[run.table["class"] == name, ["x", "y"]].to_numpy()
            assert np.asarray(dots.get_offsets()) == pytest.approx(places)
            assert to_hex(dots.get_facecolors()[0]) == colours[name]
        # Axes of such a map mean nothing.
        assert len(axis.get_xticks()) == len(axis.get_yticks()) == 0
    # Told apart twice.
    assert len({dots.get_paths()[0].vertices.tobytes() for dots in picture.figure.axes[0].collections}) == 8
    pd.testing.assert_frame_equal(picture.data, pd.concat([comparison.first.table, comparison.second.table]))
    assert picture.figure.get_size_inches()[0] == WIDTH


def test_titles_and_caption_tell_the_numbers_and_how_they_were_made(comparison: EmbeddingComparison) -> None:
    picture = draw_embedding(comparison.first, comparison.second)
    for axis, run in zip(picture.figure.axes, (comparison.first, comparison.second), strict=True):
        title = axis.get_title(loc="left")
        assert title.replace("\n", "").startswith(run.name)
        silhouette, knn = run.value("silhouette").value, run.value("knn_balanced_accuracy").value
        assert title.splitlines()[-1] == f"silhouette {silhouette:.2f}, neighbours {knn:.2f}".replace("-", "−")
        for text in (picture.caption, picture.alt):
            assert f"{knn:.3f} [{run.value('knn_balanced_accuracy').low:.3f}, " in text
    assert (
        "140 (each class in proportion, seed 0) of the 1000 images that both runs were tested on of 70 patients"
        in picture.caption
    )
    assert "mean nothing in such a map" in picture.caption
    assert "chance 0.12" in picture.caption
    assert "every image keeps its neighbours" in picture.caption
    one = draw_embedding(dataclasses.replace(comparison.first, images=140, unit="lesions"))
    assert len(one.figure.axes) == 1
    assert "all 140 test images of 70 lesions" in one.caption


def test_no_words_are_cut_off_or_lie_on_the_map(comparison: EmbeddingComparison) -> None:
    picture = draw_embedding(comparison.first, comparison.second)
    canvas = FigureCanvasAgg(picture.figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    page, legend = picture.figure.bbox, picture.figure.legends[0].get_window_extent(renderer)
    assert [text.get_text() for text in picture.figure.legends[0].get_texts()] == list(CLASSES)
    boxes = [axis.get_window_extent(renderer) for axis in picture.figure.axes]
    titles = [axis._left_title.get_window_extent(renderer) for axis in picture.figure.axes]  # type: ignore[attr-defined]
    assert all(
        page.x0 <= box.x0 and box.x1 <= page.x1 and page.y0 <= box.y0 and box.y1 <= page.y1
        for box in (*boxes, *titles, legend)
    )
    assert all(legend.y1 <= box.y0 for box in boxes)
    assert titles[1].y1 <= boxes[0].y0


def test_dots_and_lines_of_the_comparison_are_the_values_and_intervals(comparison: EmbeddingComparison) -> None:
    picture = draw_separation(comparison)
    panels = [axis for axis in picture.figure.axes if axis.get_title(loc="left")]
    assert len(panels) == 3
    for axis, measure in zip(panels, MEASURES, strict=True):
        reference, *lines = axis.lines
        assert list(reference.get_xdata()) == [1 / 8 if measure == "knn_balanced_accuracy" else 0] * 2
        for place, (run, colour) in enumerate(((comparison.first, PRIMARY), (comparison.second, SECONDARY))):
            interval, dot = lines[2 * place : 2 * place + 2]
            found = run.value(measure)
            assert list(interval.get_xdata()) == [found.low, found.high]
            assert (dot.get_xdata()[0], dot.get_ydata()[0], dot.get_color()) == (found.value, place, colour)
            row = picture.data[(picture.data["measure"] == measure) & (picture.data["run"] == run.name)]
            assert row[["value", "low", "high"]].to_numpy().tolist() == [[found.value, found.low, found.high]]
    assert len(picture.data) == 6
    assert comparison.conclusion() in picture.caption
    assert all(comparison.sentence(measure) in picture.alt for measure in MEASURES)
    assert [text.get_text().replace("\n", "") for text in picture.figure.legends[0].get_texts()] == ["near", LONG]


def test_the_pictures_can_be_put_into_a_page(comparison: EmbeddingComparison) -> None:
    for picture in (draw_embedding(comparison.first), draw_separation(comparison)):
        text = inline_svg(picture)
        assert text.startswith('<svg role="img"')
        assert re.search(r"var\(--ink\)", text)
