"""Figures: one style, the same bytes, a page's own ink, colours that colour-blind readers tell apart."""

import base64
import io
import re
import xml.etree.ElementTree as ET
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from skimage.color import rgb2lab

from dualrefnet.display.figure import (
    COLOURS,
    FAINT,
    INK,
    MARKERS,
    PAPER,
    WIDTH,
    ReportFigure,
    inline_svg,
    new_figure,
    save_figure,
    styled,
)

# What a person without one kind of cones sees, in linear RGB, complete (Machado, Oliveira and Fernandes 2009, severity
# 1.0).
CONES = {
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
    "all cones": [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
}


# CIE Lab distance. Of the first six colours the nearest two are 16.1 apart: sky blue and green without blue cones.
APART, NEAR = 15.0, 20.0


@styled
def drawn(name: str = "lines", title: str = "Lines", alt: str = "two lines") -> ReportFigure:
    """A picture with everything that carries ink: text, ticks, a grid, a legend, markers, a clipped area and images."""
    figure, (axis, other) = new_figure(2.0, 1, 2)
    axis.plot([0, 1, 2], [1, 3, 2], "o-", color=COLOURS[0], label="one")
    axis.fill_between([0, 1, 2], [0, 0, 0], [1, 3, 2], color=COLOURS[1], hatch="//")
    axis.axvline(1, color=FAINT)
    axis.text(0.5, 2, "here")
    axis.annotate("a dot", (1, 3), color=INK)
    axis.set_title("up and down")
    axis.set_xlabel("time")
    axis.legend()
    figure.suptitle("all")
    picture = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    # The same pixels twice: matplotlib calls both by one name.
    other.imshow(picture, interpolation="none")
    other.inset_axes([0.5, 0.5, 0.5, 0.5]).imshow(picture, interpolation="none")
    data = pd.DataFrame({"name": ["a", "b,c", 'd"e'], "value": [0.1, 1 / 3, np.nan], "count": [1, 2, 3]})
    return ReportFigure(name, title, "How to read it.", alt, figure, data)


def parsed(svg: str) -> ET.Element:
    return ET.fromstring(svg)


def test_ids_of_two_figures_in_one_page_dont_meet_and_are_all_found() -> None:
    found = []
    for svg in (inline_svg(drawn("first")), inline_svg(drawn("second"))):
        ids = [element.attrib["id"] for element in parsed(svg).iter() if "id" in element.attrib]
        links = re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', svg)
        assert {one or other for one, other in links} <= set(ids)
        assert any(other for _, other in links), "nothing is clipped, so the test tests nothing"
        found += ids
    assert len(set(found)) == len(found)


def test_the_ink_is_the_pages_own() -> None:
    svg = inline_svg(drawn())
    assert not [colour for colour in (INK, FAINT, PAPER) if colour in svg.lower()]
    # Only in styles: as an attribute of its own, var() isn't understood.
    assert not re.search(r'="var\(', svg)
    texts = list(parsed(svg).iter("{http://www.w3.org/2000/svg}text"))
    words = {"".join(text.itertext()).strip() for text in texts}
    assert {"up and down", "time", "one", "here", "a dot", "all"} <= words
    # Without a fill, text is black in both themes.
    assert {re.findall(r"fill: ([^;]+)", text.attrib["style"])[0] for text in texts} == {"var(--ink)"}


def test_a_screen_reader_finds_title_and_alternative_text() -> None:
    title, alt = "A < B & \"C\" 'D'", "rises > 3 & falls, it's said"
    root = parsed(inline_svg(drawn(title=title, alt=alt)))
    assert (root.attrib["role"], root.attrib["aria-label"]) == ("img", f"{title}. {alt}")
    # The column decides the width, and the box the height.
    assert {"width", "height"}.isdisjoint(root.attrib)


def test_the_same_figure_gives_the_same_bytes_and_its_numbers(tmp_path: Path) -> None:
    assert inline_svg(drawn()) == inline_svg(drawn())
    figure = drawn()
    assert inline_svg(figure) == inline_svg(figure)
    first, second = save_figure(figure, tmp_path / "new" / "folder"), save_figure(drawn(), tmp_path / "second")
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
    assert [path.name for path in first] == ["lines.png", "lines.svg", "lines.csv"]
    assert sorted(first) == sorted((tmp_path / "new" / "folder").iterdir())
    with Image.open(first[0]) as image:
        assert abs(image.width - WIDTH * 300) <= 1
        assert image.info["dpi"] == pytest.approx((300, 300), abs=0.1)
    # Letters are outlines: a printer needs no font.
    assert not list(ET.parse(first[1]).getroot().iter("{http://www.w3.org/2000/svg}text"))
    assert "var(" not in first[1].read_text()
    pd.testing.assert_frame_equal(pd.read_csv(first[2]), figure.data)


NOISE = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
HOLED = np.dstack([NOISE, np.where(np.arange(64 * 64).reshape(64, 64) < 512, 0, 255).astype(np.uint8)])


@pytest.mark.parametrize(
    ("image", "kind", "error"), [(NOISE, "jpeg", 8), (HOLED, "png", 1e-9), (np.full_like(NOISE, 90), "png", 1e-9)]
)
def test_large_images_become_jpegs_in_the_page_and_look_the_same(image: np.ndarray, kind: str, error: float) -> None:
    figure, (axis,) = styled(new_figure)(2.0)
    axis.imshow(image, interpolation="none")
    svg = inline_svg(ReportFigure("plain", "", "", "", figure, pd.DataFrame()))
    ((found, data),) = re.findall(r'"data:image/(\w+);base64,([^"]+)"', svg)
    with Image.open(io.BytesIO(base64.b64decode(data))) as read:
        shown = np.asarray(read.convert("RGBA"), dtype=float)
    assert found == kind
    # As large, the same way up, red where it was red.
    assert np.abs(shown[..., : image.shape[2]] - image).mean() < error


def lab(colours: tuple[str, ...], matrix: list[list[float]]) -> np.ndarray:
    """Return (N, 3) CIE Lab of sRGB colours as they look to somebody."""
    values = np.array([[int(colour[place : place + 2], 16) for place in (1, 3, 5)] for colour in colours]) / 255
    linear = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
    seen = np.clip(linear @ np.array(matrix).T, 0, 1)
    encoded = np.where(seen <= 0.0031308, 12.92 * seen, 1.055 * seen ** (1 / 2.4) - 0.055)
    return np.asarray(rgb2lab(encoded[None])[0])


@pytest.mark.parametrize("sight", CONES)
def test_colours_stay_apart_for_colour_blind_eyes_and_markers_where_they_come_near(sight: str) -> None:
    places = lab(COLOURS, CONES[sight])
    for one, other in combinations(range(len(COLOURS)), 2):
        distance = float(np.linalg.norm(places[one] - places[other]))
        if other < 6:
            assert distance > APART, (COLOURS[one], COLOURS[other])
        if distance < NEAR:
            assert MARKERS[one] != MARKERS[other]
