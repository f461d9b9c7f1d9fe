"""A picture: what is drawn, its data and its words, and how all of them look alike.

Pictures are as wide as a column of a journal, so that they can be read on a phone as they are in print. In the page
their
ink is replaced by the page's own, so that one drawing serves light and dark.
"""

# also: Layout of a beeswarm: where points of about the same value stand, and how low or high their colour is.

from __future__ import annotations

import base64
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from dualrefnet.errors import DependencyError
from dualrefnet.files import atomic_path, write_csv

try:
    import matplotlib
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
except ImportError:
    raise DependencyError("pictures need matplotlib: pip install 'dualrefnet[report]'") from None
from numpy.typing import NDArray

# Inches: one column of a two-column page, and the width that a phone shows without shrinking the letters much.
WIDTH = 4.0


# The page replaces these three by its own colours; on paper they are near-black, grey and white.
INK, FAINT, PAPER = "#1c1c1d", "#b4b4b5", "#fefefd"


_THEME = {INK: "var(--ink)", FAINT: "var(--faint)", PAPER: "var(--paper)"}


# Okabe and Ito (2008), told apart by people who are colour-blind; its black and yellow, which vanish on a dark or on a
# light
# page, are replaced by a grey and an ochre.
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#8a8a8b", "#b3a300")


MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")


# One colour for "this", one for "the other".
PRIMARY, SECONDARY = COLOURS[0], COLOURS[4]


# Light to dark for amounts, and the scale of heat maps: both keep their order in grey.
SEQUENTIAL_CMAP, SALIENCY_CMAP = "Blues", "inferno"


# Settings of the user's own `matplotlibrc` have no say in how pictures look; those of windows, keys and dates are left
# alone.
_USER = (
    "animation.",
    "backend",
    "date.",
    "docstring",
    "interactive",
    "_internal",
    "keymap.",
    "macosx.",
    "timezone",
    "tk.",
    "toolbar",
    "webagg.",
)


_STYLE: Any = {
    **{name: value for name, value in matplotlib.rcParamsDefault.items() if not name.startswith(_USER)},
    "font.family": "DejaVu Sans",
    "font.size": 8,
    "axes.titlesize": 8.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 8,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.linewidth": 0.4,
    "grid.color": FAINT,
    "grid.alpha": 0.6,
    "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5,
    "xtick.major.width": 0.7,
    "ytick.major.width": 0.7,
    "legend.fontsize": 7.5,
    "legend.frameon": False,
    "lines.linewidth": 1.5,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.facecolor": "none",
    "figure.facecolor": PAPER,
    "savefig.facecolor": PAPER,
    "axes.unicode_minus": True,
    # A class may be called $x$.
    "text.parse_math": False,
    "figure.constrained_layout.use": True,
}


PNG_DPI = 300


# A layout is settled when nothing moves by more than this share of the picture, or after so many attempts.
STILL, ATTEMPTS = 0.001, 8


# Images in a page that are larger become JPEGs.
SMALL_BYTES = 8_000


# Decorates every function that draws: matplotlib asks for its settings while it draws, and those of the caller stay as
# they are.
styled = matplotlib.rc_context(_STYLE)


@dataclass(frozen=True)
class ReportFigure:
    """A drawn picture.

    Attributes:
        name: stem of its files.
        title: what it shows, a few words.
        caption: how to read it and how it was made, for a reader without statistics.
        alt: what it says, in words and numbers, for a reader who doesn't see it.
        figure: the drawing.
        data: the numbers that are drawn, one tidy table.
    """

    name: str
    title: str
    caption: str
    alt: str
    figure: Figure
    data: pd.DataFrame


def new_figure(
    height: float, rows: int = 1, columns: int = 1, width: float = WIDTH, **options: Any
) -> tuple[Figure, list[Axes]]:
    """Return an empty figure and its axes, row by row; for functions that are `styled`.

    Args:
        height: inches.
        rows: of axes.
        columns: of axes.
        width: inches.
        options: of `Figure.subplots`, such as `sharex`.
    """
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **options)
    return figure, list(axes.ravel())


def class_colours(classes: Sequence[str]) -> dict[str, str]:
    """Return a colour for each class, the same in all pictures of a data set; after eight they begin again."""
    return {name: COLOURS[index % len(COLOURS)] for index, name in enumerate(classes)}


def class_markers(classes: Sequence[str]) -> dict[str, str]:
    """Return a marker for each class: with the colours they tell the classes apart twice."""
    return {name: MARKERS[index % len(MARKERS)] for index, name in enumerate(classes)}


def file_stem(text: str) -> str:
    """Return what may stand in a file's name and in an id, for a class or an image of any name."""
    return re.sub(r"[^A-Za-z0-9_-]+", "_", text)


def truncate(text: str, letters: int) -> str:
    """Return a text of at most so many letters, the last of which tells that some are missing."""
    return text if len(text) <= letters else text[: letters - 1] + "…"


def save_figure(picture: ReportFigure, folder: Path) -> list[Path]:
    """Write `<name>.png` (300 dpi), `<name>.svg` and `<name>.csv`, and return their paths."""
    paths = [folder / f"{picture.name}.{suffix}" for suffix in ("png", "svg", "csv")]
    with matplotlib.rc_context({**_STYLE, "svg.fonttype": "path", "svg.hashsalt": picture.name}):
        _settle(picture.figure)
        with atomic_path(paths[0]) as temporary:
            picture.figure.savefig(temporary, format="png", dpi=PNG_DPI)
        with atomic_path(paths[1]) as temporary:
            picture.figure.savefig(temporary, format="svg", metadata={"Date": None})
    write_csv(paths[2], picture.data)
    return paths


def inline_svg(picture: ReportFigure) -> str:
    """Return the picture as an `<svg>` element for a page that defines the CSS variables `--ink`, `--faint` and
    `--paper`.

    Its letters are text in the page's own font: they can be searched and read aloud, and no font has to be fetched.
    """
    buffer = io.StringIO()
    with matplotlib.rc_context({**_STYLE, "svg.fonttype": "none", "svg.hashsalt": picture.name}):
        _settle(picture.figure)
        picture.figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"data:image/png;base64,([^\"]+)", lambda found: _lighter(found[1]), text)
    for colour, variable in _THEME.items():
        text = text.replace(colour, variable)
    text = text.replace("'DejaVu Sans'", "system-ui, sans-serif")
    # The size of the page's column, not of the paper.
    text = re.sub(r'<svg([^>]*?) width="[^"]*"', r"<svg\1", text, count=1)
    text = re.sub(r'<svg([^>]*?) height="[^"]*"', r"<svg\1", text, count=1)
    # Several pictures stand in one page, and ids must not meet. Those of equal images do within a picture, and nothing
    # uses them.
    text = re.sub(r'(<image\b[^>]*?) id="[^"]*"', r"\1", text)
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\1{picture.name}-", text)
    label = escape(f"{picture.title}. {picture.alt}", quote=True)
    return text.replace("<svg", f'<svg role="img" aria-label="{label}"', 1).strip()


def _settle(figure: Figure) -> None:
    """Lay a figure out for good: matplotlib would move its parts a little with every drawing, and page and files would
    differ.
    """
    engine, dpi = figure.get_layout_engine(), figure.dpi
    if engine is None:
        return
    figure.set_dpi(PNG_DPI)
    before = np.full((len(figure.axes), 4), np.inf)
    for _ in range(ATTEMPTS):
        engine.execute(figure)
        places = np.array([axis.get_position().bounds for axis in figure.axes])
        moved, before = np.abs(places - before).max(initial=0), places
        if moved < STILL:
            break
    figure.set_layout_engine("none")
    figure.set_dpi(dpi)


def _lighter(png: str) -> str:
    """Return a photograph's data URL as JPEG, a quarter of the size; what is small or transparent stays PNG."""
    data = base64.b64decode(png)
    with Image.open(io.BytesIO(data)) as image:
        opaque = image.mode == "RGB" or (image.mode == "RGBA" and image.getchannel("A").getextrema() == (255, 255))
        if not opaque or len(data) < SMALL_BYTES:
            return f"data:image/png;base64,{png}"
        buffer = io.BytesIO()
        image.convert("RGB").save(buffer, "JPEG", quality=90, subsampling=0, optimize=True)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def rank_colour_scale(amount: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return 0..1 from the 5th to the 95th percentile of what is known, or over all of it where these are one."""
    known = amount[~np.isnan(amount)].astype(float)
    if not len(known):
        return np.full(len(amount), np.nan)
    low, high = np.percentile(known, [5, 95])
    if low == high:
        low, high = known.min(), known.max()
    return np.clip((amount - low) / (high - low), 0, 1) if high > low else np.where(np.isnan(amount), np.nan, 0.5)


def beeswarm_offsets(values: NDArray[np.float32], width: float) -> NDArray[np.float64]:
    """Return heights within -0.4..0.4 at which points of about the same value stand beside each other, from the middle
    outwards.
    """
    bins = np.round(values / width).astype(int)
    heights = np.zeros(len(values))
    for each in np.unique(bins):
        members = np.flatnonzero(bins == each)
        heights[members] = [(step + 1) // 2 * (-1) ** step for step in range(len(members))]
    return heights * min(0.09, 0.4 / max(1.0, float(np.abs(heights).max())))
