"""What a data set's images are like before and after preprocessing (Figure 1b): classes, brightness and colour cast."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import cv2
import numpy as np
import pandas as pd
from numpy.typing import NDArray

from dualrefnet.data.images import decode_image
from dualrefnet.data.protocols import split_counts
from dualrefnet.data.store import map_ahead
from dualrefnet.display.figure import COLOURS, INK, ReportFigure, new_figure, styled
from dualrefnet.display.format import Cell, PrintedTable, number
from dualrefnet.errors import DataError, ImageError
from dualrefnet.recipe import ImageSection
from dualrefnet.runtime.preprocessing import clahe_lightness, shades_of_gray, to_square

# Step of the preprocessing -> what an image is then.
STAGES = {"recorded": "as recorded", "shades_of_gray": "after colour constancy", "clahe": "after CLAHE"}
MEASURES = {"brightness": "brightness (mean L*)", "cast": "colour cast (chroma of the mean colour)"}
# Pixels a side of what is measured; a mean needs no more.
SIDE = 256


def colour_statistics(image: NDArray[np.uint8]) -> tuple[float, float]:
    """Return brightness (mean L*, 0 to 100) and colour cast (chroma of the mean colour, CIE LAB) of (H, W, 3) RGB."""
    lab = cv2.cvtColor(to_square(image, SIDE, "squash").astype(np.float32) / 255, cv2.COLOR_RGB2LAB)
    lightness, a, b = lab.reshape(-1, 3).mean(axis=0, dtype=np.float64)
    return float(lightness), float(np.hypot(a, b))


def measure_images(table: pd.DataFrame, settings: ImageSection, workers: int | None = None) -> pd.DataFrame:
    """Return image_id, class, stage, brightness and cast of each readable image and step of `STAGES`."""
    images = list(zip(table["image_id"], table["label"], table["image_path"], strict=True))
    found = map_ahead(partial(_measure, settings=settings), images, workers, label="brightness and colour")
    rows = [row for image in found for row in image]
    if not rows:
        raise DataError("no image can be read, so brightness and colour cast can't be measured")
    return pd.DataFrame(rows, columns=["image_id", "class", "stage", *MEASURES])


def _measure(row: tuple[str, str, str], settings: ImageSection) -> list[tuple[object, ...]]:
    image_id, label, path = row
    try:
        image = decode_image(path)
    except (OSError, ImageError):
        return []
    found = [(image_id, label, "recorded", *colour_statistics(image))]
    if settings.colour_constancy == "shades_of_gray":
        image = shades_of_gray(image, settings.minkowski_p, settings.gamma)
        found.append((image_id, label, "shades_of_gray", *colour_statistics(image)))
    if settings.clahe:
        image = clahe_lightness(image, settings.clahe_clip, settings.clahe_grid, settings.clahe_channel_order)
        found.append((image_id, label, "clahe", *colour_statistics(image)))
    return [tuple(values) for values in found]


def summarise(measured: pd.DataFrame, classes: Sequence[str]) -> pd.DataFrame:
    """Return class (`all` last), stage, images, and mean and standard deviation of both measures."""
    parts = [measured, measured.assign(**{"class": "all"})]
    groups = pd.concat(parts).groupby(["class", "stage"])
    columns = {f"{name}_{what}": (name, what) for name in MEASURES for what in ("mean", "std")}
    summary = groups.agg(images=("image_id", "size"), **columns)
    order = [(name, stage) for name in (*classes, "all") for stage in STAGES]
    return summary.loc[[place for place in order if place in summary.index]].reset_index()


def statistics_table(measured: pd.DataFrame, classes: Sequence[str]) -> PrintedTable:
    """Return mean and spread of brightness and colour cast for each class before and after preprocessing."""
    summary = summarise(measured, classes)
    stages = [stage for stage in STAGES if stage in set(summary["stage"])]
    rows = []
    for name, group in summary.groupby("class", sort=False):
        found: dict[str, dict[str, float]] = group.set_index("stage").to_dict("index")  # type: ignore[assignment]
        line = [Cell(str(name)), Cell(f"{group['images'].iloc[0]:,}")]
        for measure in MEASURES:
            for stage in stages:
                mean, spread = (number(found[stage][f"{measure}_{what}"], ".1f") for what in ("mean", "std"))
                line.append(Cell(mean, f"± {spread}"))
        rows.append(line)
    heads = [f"{name}, {STAGES[stage]}" for name in MEASURES for stage in stages]
    note = (
        "Mean ± standard deviation over images. Brightness: mean L* of CIE LAB, 0 to 100. Colour cast: distance of the "
        "mean colour from grey in CIE LAB."
    )
    return PrintedTable("Brightness and colour cast by class", ("class", "images", *heads), rows, (note,))


@styled
def draw_statistics(measured: pd.DataFrame, classes: Sequence[str]) -> ReportFigure:
    """Draw brightness and colour cast of each class's images at each step of the preprocessing."""
    from matplotlib.patches import Patch

    classes = [name for name in classes if (measured["class"] == name).any()]
    stages = [stage for stage in STAGES if (measured["stage"] == stage).any()]
    figure, axes = new_figure(4.4, len(MEASURES), sharex=True)
    for axis, (measure, title) in zip(axes, MEASURES.items(), strict=True):
        for place, stage in enumerate(stages):
            rows = measured[measured["stage"] == stage]
            values = [rows.loc[rows["class"] == name, measure].to_numpy() for name in classes]
            width = 0.8 / len(stages)
            drawn = axis.boxplot(
                values,
                positions=np.arange(len(classes)) + (place - (len(stages) - 1) / 2) * width,
                widths=0.85 * width,
                patch_artist=True,
                medianprops={"color": INK, "linewidth": 1},
                flierprops={"marker": ".", "markersize": 2, "markeredgecolor": COLOURS[place]},
                boxprops={"facecolor": COLOURS[place], "linewidth": 0.6},
                whiskerprops={"linewidth": 0.6},
                capprops={"linewidth": 0.6},
            )
            for box in drawn["boxes"]:
                box.set_edgecolor(INK)
        axis.set_title(title[0].upper() + title[1:])
        axis.grid(visible=False, axis="x")
        axis.set_xticks(np.arange(len(classes)), classes)
    handles = [Patch(facecolor=COLOURS[place], label=STAGES[stage]) for place, stage in enumerate(stages)]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(stages))
    images = measured["image_id"].nunique()
    spread = measured.groupby("stage")[list(MEASURES)].std().to_dict("index")
    each = "; ".join(
        f"{STAGES[stage]} {' and '.join(number(value, '.1f') for value in spread[stage].values())}" for stage in stages
    )
    caption = (
        f"Brightness and colour cast of {images:,} images by class: median, quartiles, and 1.5 times their distance. "
        f"Standard deviation of brightness and colour cast over all images: {each}."
    )
    return ReportFigure("image_statistics", "Brightness and colour cast", caption, caption, figure, measured)


@styled
def draw_class_counts(split: pd.DataFrame, classes: Sequence[str]) -> ReportFigure:
    """Draw how many images of each class each part of a split (label, split) has."""
    counts = split_counts(split, tuple(classes)).iloc[:-1]
    figure, (axis,) = new_figure(2.4)
    parts = [str(part) for part in counts.columns]
    width = 0.8 / len(parts)
    for place, part in enumerate(parts):
        positions = np.arange(len(classes)) + (place - (len(parts) - 1) / 2) * width
        axis.bar(positions, counts[part], width, color=COLOURS[place], label=part)
    axis.set_xticks(np.arange(len(classes)), list(classes))
    axis.set_ylabel("images")
    axis.grid(visible=False, axis="x")
    figure.legend(loc="outside lower center", ncols=len(parts))
    times = counts.sum(axis=1).max() / max(1, counts.sum(axis=1).min())
    caption = (
        f"Images of each class in {', '.join(parts)}. The most frequent class has {times:.0f} times as many as the "
        "rarest."
    )
    alt = "; ".join(f"{name}: " + ", ".join(f"{part} {row[part]}" for part in parts) for name, row in counts.iterrows())
    data = counts.rename_axis("class").reset_index()
    return ReportFigure("class_counts", "Images of each class", caption, alt, figure, data)
