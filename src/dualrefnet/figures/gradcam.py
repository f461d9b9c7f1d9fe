"""Pictures of Grad-CAM: the heat laid over photographs, and how much of it lies in lesions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from dualrefnet.errors import DependencyError
from dualrefnet.figures.picture import COLOURS, HEAT, MARKERS, PRIMARY, SECONDARY, WIDTH, Picture, new_figure, styled

try:
    from matplotlib import colormaps
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure
    from matplotlib.patheffects import withStroke
except ImportError:
    raise DependencyError("pictures need matplotlib: pip install 'dualrefnet[report]'") from None

if TYPE_CHECKING:
    # That module needs captum; drawing doesn't.
    from dualrefnet.explain.localisation import Localisation

# How much of the photograph the hottest place hides; from half of the maximum on, all hide as much.
_COVER, _FULL_FROM = 0.65, 0.5
_GREY = 170
_BAR = 0.1  # inches, height of the scale
_LETTERS = 18


@dataclass(frozen=True)
class HeatCase:
    """One image with its heat, as it is drawn.

    Attributes:
        title: names the image.
        picture: (S, S, 3) uint8, as the model sees it.
        heats: class -> (S, S) Grad-CAM of that class, not negative; of `predicted` and of `other` at least.
        probabilities: class -> probability, of the same classes.
        label: the true class.
        predicted: the most probable class.
        other: the class of the last column, such as the true one, or the second most probable one.
        mask: (S, S) True in the lesion; None: there is none.
    """

    title: str
    picture: NDArray[np.uint8]
    heats: Mapping[str, NDArray[np.float32]]
    probabilities: Mapping[str, float]
    label: str
    predicted: str
    other: str
    mask: NDArray[np.bool_] | None = None


def overlay(picture: NDArray[np.uint8], heat: NDArray[Any]) -> NDArray[np.uint8]:
    """Lay heat over a picture, in shares of its maximum; where it is low the skin stays visible.

    Args:
        picture: (S, S, 3).
        heat: (S, S), not negative; without any heat the picture stays as it is.

    Returns:
        (S, S, 3).

    Raises:
        ValueError: the shapes don't fit, or heat is negative or not finite.
    """
    if heat.shape != picture.shape[:2]:
        raise ValueError(f"heat {heat.shape} doesn't fit a picture {picture.shape}")
    if not np.isfinite(heat).all() or heat.min() < 0:
        raise ValueError("heat must be finite and not negative")
    largest = float(heat.max())
    share = heat.astype(np.float64) / largest if largest > 0 else np.zeros(heat.shape)
    colour = 255 * colormaps[HEAT](share)[..., :3]
    cover = _COVER * np.minimum(share / _FULL_FROM, 1)[..., None]
    return np.asarray(np.rint((1 - cover) * picture + cover * colour), dtype=np.uint8)


@styled
def draw_gradcam(cases: Sequence[HeatCase], choice: str, encoders: int = 1) -> Picture:
    """Draw images beside the heat of the predicted and of another class.

    Args:
        cases: one a row.
        choice: one sentence that says how they were chosen.
        encoders: how many image encoders the model has.
    """
    rows = len(cases)
    figure, axes = new_figure(rows * (WIDTH / 3 + 0.3) + 0.6, rows, 3)
    drawn: list[dict[str, Any]] = []
    for case, (plain, first, second) in zip(cases, zip(*[iter(axes)] * 3, strict=True), strict=True):
        _panel(plain, case.picture, case.mask, f"{_short(case.title)}\ntrue: {_short(case.label, _LETTERS - 6)}")
        for axis, name, role in ((first, case.predicted, "predicted"), (second, case.other, "other")):
            said = "predicted" if name == case.predicted else "true" if name == case.label else "not predicted"
            heat = case.heats[name]
            words = f"{case.probabilities[name]:.0%}, {said}" if heat.max() > 0 else f"{case.probabilities[name]:.0%}, no evidence"
            _panel(axis, overlay(case.picture, heat), case.mask, f"{_short(name)}\n{words}")
            drawn.append(
                {
                    "image": case.title,
                    "label": case.label,
                    "column": role,
                    "class": name,
                    "probability": case.probabilities[name],
                    "maximum": float(heat.max()),
                    "in_mask": np.nan if case.mask is None or heat.max() <= 0 else float(heat[case.mask].sum() / heat.sum()),
                }
            )
    _scale(figure, axes)
    data = pd.DataFrame(drawn)
    sentences = [
        "Left the picture as the model sees it; beside it the places that speak for a class (Grad-CAM), with its probability.",
        "Glowing places speak for it most; where there is little, the picture shows through.",
        "Each map is in shares of its own maximum, so that two maps can't be compared in strength.",
    ]
    if encoders > 1:
        sentences.append(f"Shown is the mean of the maps of {encoders} encoders, each in shares of its maximum.")
    if any(case.mask is not None for case in cases):
        sentences.append("The white line is the lesion's outline, which the model doesn't see.")
    parts = []
    for row in drawn:
        inside = "" if np.isnan(row["in_mask"]) else f", {row['in_mask']:.0%} of the heat in the lesion"
        parts.append(f"{row['image']} (true {row['label']}): {row['class']} {row['probability']:.0%}{inside}")
    return Picture("gradcam", "Where the model looks", " ".join([*sentences, choice]), "; ".join(parts), figure, data)


@styled
def draw_localisation(result: Localisation) -> Picture:
    """Draw how much of the heat lies in lesions, of all images and of each class, beside a spot in the middle and even heat."""
    names = list(dict.fromkeys(result.summary["class"]))
    figure, axes = new_figure(0.36 * len(names) + 1.15, 1, 2, sharey=True)
    series = (
        ("value", "", PRIMARY, "Grad-CAM"),
        ("baseline", "baseline_", SECONDARY, "spot in the middle"),
        ("area", "area_", COLOURS[6], "even heat"),
    )
    titles = {"energy": "heat in the lesion", "pointing": "hottest place in it"}
    for axis, (measure, title) in zip(axes, titles.items(), strict=True):
        rows = result.summary[result.summary["measure"] == measure].set_index("class").loc[names]
        for number, (column, prefix, colour, words) in enumerate(series):
            places = np.arange(len(names)) + 0.24 * (number - 1)
            low, high = rows[f"{prefix}low"].to_numpy(), rows[f"{prefix}high"].to_numpy()
            axis.hlines(places, low, high, color=colour, linewidth=1.2)
            axis.plot(rows[column], places, MARKERS[number], color=colour, markersize=3.8, label=words)
        axis.set_title(title)
        axis.set_xlim(-0.03, 1.03)
        axis.set_xticks([0, 0.5, 1], ["0%", "50%", "100%"])
        axis.grid(axis="y", visible=False)
        axis.axhline(0.5, color=COLOURS[6], linewidth=0.5)
    counts = result.summary[result.summary["measure"] == "pointing"].set_index("class")["images"]
    axes[0].set_yticks(range(len(names)), [f"{_short(name, 14)} ({counts[name]})" for name in names])
    axes[0].set_ylim(len(names) - 0.5, -0.5)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, columnspacing=1.0, handletextpad=0.2)
    return Picture("localisation", "Does Grad-CAM look at the lesion?", _caption(result), _alt(result), figure, result.summary)


def _panel(axis: Axes, picture: NDArray[np.uint8], mask: NDArray[np.bool_] | None, title: str) -> None:
    axis.imshow(picture, interpolation="none")
    axis.set_title(title, fontsize=7, fontweight="normal", loc="left")
    axis.set_axis_off()
    if mask is not None and mask.any() and not mask.all():
        line = axis.contour(mask.astype(float), [0.5], colors="#ffffff", linewidths=0.7)
        # White on light skin needs a dark edge.
        line.set_path_effects([withStroke(linewidth=1.7, foreground="#000000")])


def _scale(figure: Figure, axes: list[Axes]) -> None:
    """Add the one scale of all maps: what each share of the maximum makes of a plain grey."""
    strip = overlay(np.full((1, 256, 3), _GREY, dtype=np.uint8), np.linspace(0, 1, 256)[None])[0]
    colours = ListedColormap([tuple(colour / 255) for colour in strip])
    share = _BAR / figure.get_figheight()
    bar = figure.colorbar(ScalarMappable(cmap=colours), ax=axes, location="bottom", fraction=share, pad=share, aspect=WIDTH / _BAR)
    bar.set_ticks([0, 0.5, 1], labels=["little", "half of the maximum", "much"])
    bar.set_label("evidence for the class, share of the map's maximum")
    bar.outline.set_visible(False)


def _caption(result: Localisation) -> str:
    sides = " and ".join(dict.fromkeys(f"{side} x {side}" for side in result.map_sides))
    remarks = {
        f"Images left out with an empty mask: {result.empty_masks}.": result.empty_masks,
        f"Images without any heat, counted as missed: {result.empty_heats}.": result.empty_heats,
    }
    patients = result.summary.loc[result.summary["measure"] == "pointing", "patients"].iloc[0]
    sentences = [
        "How much of Grad-CAM's heat for the predicted class lies in the lesion, and how often its hottest place does, in "
        f"{len(result.table)} test images of {patients} patients (of {result.images} test images, {result.with_mask} have a mask; seed "
        f"{result.seed}) and in those of each true class (their number in brackets).",
        "Beside it stand a round spot in the middle, which ignores the picture, and even heat, which reaches the lesion's share of the "
        "picture; only what is beyond the spot comes of looking.",
        f"Lines are 95% intervals ({result.samples} bootstrap samples over patients); where few images agree they are too short.",
        f"The heat was enlarged from {sides} places.",
        *(remark for remark, count in remarks.items() if count),
    ]
    return " ".join(sentences)


def _alt(result: Localisation) -> str:
    titles = {"energy": "heat in the lesion", "pointing": "hottest place in it"}
    parts = []
    for row in result.summary.to_dict("records"):
        difference, low, high = (100 * row[column] for column in ("difference", "difference_low", "difference_high"))
        interval = "no interval" if np.isnan(low) else f"{low:+.0f} to {high:+.0f}"
        parts.append(
            f"{row['class']}, {titles[row['measure']]}: Grad-CAM {row['value']:.0%}, spot {row['baseline']:.0%}, "
            f"even heat {row['area']:.0%}, Grad-CAM less spot {difference:+.0f} points ({interval})"
        )
    return "; ".join(parts)


def _short(text: str, letters: int = _LETTERS) -> str:
    return text if len(text) <= letters else text[: letters - 1] + "…"
