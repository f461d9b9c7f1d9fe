"""Figures of reports: one style, and the same drawing as PNG, SVG, CSV and inline SVG.

Figures are as wide as a journal column, so that they can be read on a phone as in print. In a page their ink is
replaced by the page's own colours, so that one drawing serves light and dark. matplotlib is only imported to draw.
"""

from __future__ import annotations

import base64
import functools
import io
import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image

from dualrefnet.errors import DependencyError, install_hint
from dualrefnet.files import atomic_path, write_csv

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Params = ParamSpec("Params")
Result = TypeVar("Result")

# Inches: one column of a two-column page, and the width that a phone shows without shrinking the letters much.
WIDTH = 4.0
# The page replaces these three by its own colours; on paper they are near-black, grey and white.
INK, FAINT, PAPER = "#1c1c1d", "#b4b4b5", "#fefefd"
_THEME = {INK: "var(--ink)", FAINT: "var(--faint)", PAPER: "var(--paper)"}
# Okabe and Ito (2008), colour-blind safe; its black and yellow, which vanish on a dark or on a light page, are replaced
# by a grey and an ochre.
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#8a8a8b", "#b3a300")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
PRIMARY, SECONDARY = COLOURS[0], COLOURS[4]
# Both keep their order in grey.
SEQUENTIAL_CMAP, SALIENCY_CMAP = "Blues", "inferno"

_STYLE: dict[str, Any] = {
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
# All other settings are matplotlib's defaults whatever the user's `matplotlibrc` says, but for those of windows, keys
# and dates.
_KEPT = ("animation.", "backend", "date.", "docstring", "interactive", "_internal", "keymap.", "macosx.", "timezone")
PNG_DPI = 300
# A layout is settled when nothing moves by more than this share of the figure, or after so many attempts.
STILL, ATTEMPTS = 0.001, 8
# Images in a page that are larger become JPEGs.
SMALL_BYTES = 8_000


@dataclass(frozen=True)
class ReportFigure:
    """A figure with all that goes beside it."""

    name: str
    title: str
    caption: str
    alt: str
    figure: Figure
    data: pd.DataFrame


def _style(**settings: str) -> AbstractContextManager[None]:
    try:
        import matplotlib
    except ImportError:
        raise DependencyError(f"figures need matplotlib: {install_hint('report')}") from None
    default = {
        name: value
        for name, value in matplotlib.rcParamsDefault.items()
        if not name.startswith((*_KEPT, "tk.", "toolbar", "webagg."))
    }
    style: Any = {**default, **_STYLE, **settings}
    return matplotlib.rc_context(style)


def styled(draw: Callable[Params, Result]) -> Callable[Params, Result]:
    """Decorate a function that draws: it sees the settings of reports, and those of its caller stay as they are."""

    @functools.wraps(draw)
    def draw_styled(*args: Params.args, **kwargs: Params.kwargs) -> Result:
        with _style():
            return draw(*args, **kwargs)

    return draw_styled


def new_figure(
    height: float, rows: int = 1, columns: int = 1, width: float = WIDTH, **options: Any
) -> tuple[Figure, list[Axes]]:
    """Return an empty figure of a size in inches and its axes, row by row; `options` are those of `Figure.subplots`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **options)
    return figure, list(axes.ravel())


def class_colours(classes: Sequence[str]) -> dict[str, str]:
    """Return a colour for each class, the same in all figures of a data set; after eight they begin again."""
    return {name: COLOURS[index % len(COLOURS)] for index, name in enumerate(classes)}


def class_markers(classes: Sequence[str]) -> dict[str, str]:
    """Return a marker for each class: with the colours they tell the classes apart twice."""
    return {name: MARKERS[index % len(MARKERS)] for index, name in enumerate(classes)}


def file_stem(text: str) -> str:
    """Return what may stand in a file's name and in an id, for a class or an image of any name."""
    return re.sub(r"[^A-Za-z0-9_-]+", "_", text)


def truncate(text: str, letters: int) -> str:
    return text if len(text) <= letters else text[: letters - 1] + "…"


def label_rows(axis: Axes, places: ArrayLike, labels: Sequence[str], numbers: Sequence[str] = ()) -> None:
    """Name the rows of an axis on the left, and write their numbers on the right."""
    axis.set_yticks(places, labels)
    axis.tick_params(axis="y", length=0)
    axis.grid(visible=False, axis="y")
    axis.locator_params(axis="x", nbins=6)
    if numbers:
        right = axis.secondary_yaxis("right")
        right.set_yticks(places, numbers)
        right.tick_params(length=0, labelsize=7)
        right.spines["right"].set_visible(False)


def show_image(axis: Axes, image: NDArray[np.uint8], title: str) -> None:
    axis.imshow(image, interpolation="none")
    axis.set_title(title, fontsize=7, fontweight="normal")
    axis.set_axis_off()


def beeswarm_offsets(values: NDArray[np.float32], width: float) -> NDArray[np.float64]:
    """Return heights within -0.4..0.4 at which points of about the same value stand side by side."""
    bins = np.round(values / width).astype(int)
    heights = np.zeros(len(values))
    for each in np.unique(bins):
        members = np.flatnonzero(bins == each)
        heights[members] = [(step + 1) // 2 * (-1) ** step for step in range(len(members))]
    return heights * min(0.09, 0.4 / max(1.0, float(np.abs(heights).max())))


def save_figure(drawn: ReportFigure, folder: Path) -> list[Path]:
    """Write `<name>.png` (300 dpi), `<name>.svg` and `<name>.csv`, and return their paths."""
    png, svg, csv = paths = [folder / f"{drawn.name}.{suffix}" for suffix in ("png", "svg", "csv")]
    with _style(**{"svg.fonttype": "path", "svg.hashsalt": drawn.name}):
        _settle(drawn.figure)
        with atomic_path(png) as temporary:
            drawn.figure.savefig(temporary, format="png", dpi=PNG_DPI)
        with atomic_path(svg) as temporary:
            drawn.figure.savefig(temporary, format="svg", metadata={"Date": None})
    write_csv(csv, drawn.data)
    return paths


def inline_svg(drawn: ReportFigure) -> str:
    """Return the figure as an `<svg>` that takes the page's colours and font, so that its text can be searched."""
    buffer = io.StringIO()
    with _style(**{"svg.fonttype": "none", "svg.hashsalt": drawn.name}):
        _settle(drawn.figure)
        drawn.figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"data:image/png;base64,([^\"]+)", lambda match: _compress(match[1]), text)
    for colour, variable in _THEME.items():
        text = text.replace(colour, variable)
    text = text.replace("'DejaVu Sans'", "system-ui, sans-serif")
    # The size of the page's column, not of the paper.
    text = re.sub(r'<svg([^>]*?) width="[^"]*"', r"<svg\1", text, count=1)
    text = re.sub(r'<svg([^>]*?) height="[^"]*"', r"<svg\1", text, count=1)
    # Several figures stand in one page, and ids must not meet. Those of equal images do within a figure, and nothing
    # uses them.
    text = re.sub(r'(<image\b[^>]*?) id="[^"]*"', r"\1", text)
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\1{drawn.name}-", text)
    label = escape(f"{drawn.title}. {drawn.alt}", quote=True)
    return text.replace("<svg", f'<svg role="img" aria-label="{label}"', 1).strip()


def _settle(figure: Figure) -> None:
    """Lay a figure out once: matplotlib would move its parts a little with every drawing."""
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


def _compress(png: str) -> str:
    """Return an image's data URL as JPEG, a quarter of the size; what is small or transparent stays PNG."""
    data = base64.b64decode(png)
    with Image.open(io.BytesIO(data)) as image:
        opaque = image.mode == "RGB" or (image.mode == "RGBA" and image.getchannel("A").getextrema() == (255, 255))
        if not opaque or len(data) < SMALL_BYTES:
            return f"data:image/png;base64,{png}"
        buffer = io.BytesIO()
        image.convert("RGB").save(buffer, "JPEG", quality=90, subsampling=0, optimize=True)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
