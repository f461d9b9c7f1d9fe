"""How unlike the training photographs pictures of several kinds are: one strip of dots a kind, with the limit."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.ticker import FixedLocator, NullFormatter, NullLocator

from dualrefnet.evaluation.out_of_scope import CLOSE_LESION, EVERYDAY, LESIONS, OutOfScopeMeasured
from dualrefnet.figures.picture import INK, PRIMARY, SECONDARY, Picture, new_figure, styled
from dualrefnet.figures.swarm import swarm
from dualrefnet.models.out_of_scope import FALSE_ALARMS

# Values at which the scale may have a tick, and the width of a column of dots in powers of ten, as a share of the axis.
TICKS, COLUMN = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000), 0.012


@styled
def draw_out_of_scope(measured: OutOfScopeMeasured) -> Picture:
    """Draw the scores, a strip a group.

    Args:
        measured: from `measure_out_of_scope`.
    """
    rows = [row for row in measured.table.to_dict("records") if row["group"] != EVERYDAY]
    scores = measured.scores.assign(score=measured.scores["score"].clip(lower=1e-3))
    low, high = 0.93 * float(scores["score"].min()), 1.07 * float(scores["score"].max())
    figure, axes = new_figure(0.45 + 0.55 * len(rows), len(rows), 1, sharex=True)
    width = COLUMN * float(np.log10(high / low))
    for axis, row in zip(axes, rows, strict=True):
        values = scores.loc[scores["group"] == row["group"], "score"].to_numpy()
        of_lesions = row["group"] in (LESIONS, CLOSE_LESION)
        axis.plot(
            values, swarm(np.log10(values).astype(np.float32), width), "o" if of_lesions else "D", markersize=2.2 if of_lesions else 2,
            color=PRIMARY if of_lesions else SECONDARY, markeredgewidth=0, alpha=0.75, clip_on=False,
        )  # fmt: skip
        axis.axvline(1, color=INK, linewidth=1)
        axis.set(xscale="log", xlim=(low, max(high, 1.2)), ylim=(-0.5, 0.5), yticks=[])
        axis.spines["left"].set_visible(False)
        axis.grid(axis="y", visible=False)
        axis.set_title(str(row["group"]), fontsize=7.5, fontweight="normal", pad=2)
        axis.set_title(_numbers(row["auroc"], row["flagged"]), fontsize=7.5, fontweight="normal", loc="right", pad=2)
        axis.tick_params(axis="x", which="both", length=0)
    axes[-1].xaxis.set_major_locator(FixedLocator([tick for tick in TICKS if low <= tick <= high]))
    axes[-1].xaxis.set_minor_locator(NullLocator())
    axes[-1].xaxis.set_minor_formatter(NullFormatter())
    axes[-1].xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes[-1].set_xlabel("how unlike the training photographs; beyond 1 it warns")
    caption = (
        f"One dot a picture. At the line, {FALSE_ALARMS:.0%} of {measured.validation} photographs of lesions that were kept for comparison "
        f"lie to the right; round dots are lesions. AUROC: how often a picture of the group lies to the right of a test photograph of a "
        f"lesion (0.5 is chance, 1 always). {measured.images} test photographs; the other pictures are of sources that the score wasn't "
        f"chosen with (seed {measured.seed})."
    )
    words = [f"{row['group']}: {row['pictures']} pictures, {_numbers(row['auroc'], row['flagged'])}" for row in rows]
    # Sources are patients, too; and the order of the rows would tell which of them are of one.
    data = measured.scores.drop(columns="source").sort_values(["group", "score"], ignore_index=True)
    return Picture("out_of_scope", "Which pictures it warns of", caption, "; ".join(words), figure, data)


def _numbers(auroc: float, flagged: float) -> str:
    warned = f"{flagged:.1%} warned of"
    return warned if pd.isna(auroc) else f"AUROC {auroc:.3f}, {warned}"
