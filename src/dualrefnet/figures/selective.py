"""Picture of a model that may keep silent: how right the answers are, the fewer it gives."""

from __future__ import annotations

from matplotlib.axes import Axes

from dualrefnet.evaluation.selective import Selective
from dualrefnet.figures.picture import COLOURS, PRIMARY, Picture, new_figure, styled

# Fewer answers than this say little, and the band would fill the picture.
FEW = 20
# Measure, name, colour and line.
_LINES = (("accuracy", "accuracy", PRIMARY, "-"), ("balanced_accuracy", "balanced accuracy", COLOURS[4], "--"))
# Shares that the words name, in percent.
_NAMED = (100, 80, 50)


@styled
def draw_selective(selective: Selective, unit: str = "patients") -> Picture:
    """Draw accuracy and balanced accuracy over the share of images that is answered.

    Args:
        selective: from `measure_selective`, over a curve of shares.
        unit: what was resampled, in words, for the caption.
    """
    table = selective.table[selective.table["images"] >= min(FEW, selective.images)]
    figure, axes = new_figure(3.9, 2, 1, sharex=True)
    for axis, (measure, name, colour, line) in zip(axes, _LINES, strict=True):
        _draw(axis, selective, measure, colour, line)
        axis.set_title(name)
    axes[-1].set_xlabel("images answered, %  (the surest first)")
    banded = bool(table["accuracy_low"].notna().any())
    band = f" Bands hold {100 * selective.level:g}% of {selective.samples} resamples of the {unit} (seed {selective.seed})."
    silent = table["balanced_accuracy"].isna().any()
    caption = (
        f"If only the images are answered of which the model is surest, how many of the answers are right? At the right end all "
        f"{selective.images} test images of {selective.groups} {unit} are answered; shares of fewer than {FEW} images aren't drawn."
        + (band if banded else "")
        + (" Balanced accuracy ends where no image of some class is answered any more." if silent else "")
        + f" Mean share of wrong answers over the whole curve (AURC): {_aurc(selective)}; 0 is perfect."
    )
    at = selective.table.set_index("percent")
    words = [
        f"{percent}% answered: accuracy {at['accuracy'][percent]:.2f}, balanced accuracy "
        + ("undefined" if at["balanced_accuracy"].isna()[percent] else f"{at['balanced_accuracy'][percent]:.2f}")
        for percent in _NAMED
        if percent in at.index
    ]
    alt = "; ".join([*words, f"AURC {_aurc(selective)}"])
    return Picture("selective", "Right answers when the model may keep silent", caption, alt, figure, table.reset_index(drop=True))


def _draw(axis: Axes, selective: Selective, measure: str, colour: str, line: str) -> None:
    table = selective.table[selective.table["images"] >= min(FEW, selective.images)]
    percent = 100 * table["share"]
    axis.fill_between(percent, table[f"{measure}_low"], table[f"{measure}_high"], color=colour, alpha=0.25, linewidth=0)
    axis.plot(percent, table[measure], line, color=colour)
    lowest = table[[measure, f"{measure}_low"]].min().min()
    floor = 0.0 if lowest != lowest else max(0.0, lowest - 0.05)
    axis.set(xlim=(percent.min() if percent.min() < 100 else 0, 100), ylim=(floor, 1.02))
    axis.margins(x=0)


def _aurc(selective: Selective) -> str:
    interval = selective.aurc_interval
    return f"{selective.aurc:.3f}" + ("" if interval is None else f" [{interval[0]:.3f}, {interval[1]:.3f}]")
