"""Pictures of varying availability: what runs reach as answers and photographs are missing."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter

from dualrefnet.evaluation.tables import MEASURE_NAMES
from dualrefnet.figures.picture import COLOURS, INK, MARKERS, Picture, new_figure, styled
from dualrefnet.probes.availability import WITH, WITHOUT, Availability

# Inches: a line of a label, a mark, between two rows, and all that isn't a row. Letters of a line of a label.
LINE, SLOT, GAP, REST, LETTERS = 0.125, 0.15, 0.1, 1.0, 30
# Runs in one picture.
MOST = 4


@styled
def draw_availability(runs: Sequence[Availability], measure: str = "balanced_accuracy") -> Picture:
    """Draw a measure against the share of the recorded answers that are kept, with 95% bands.

    One run is one panel with a line with and one without photograph; of several runs there is a panel for each of the two.

    Args:
        runs: from `measure_availability`, at most four, of the same test images.
        measure: `balanced_accuracy` or `auc_macro_ovr`.

    Raises:
        ValueError: there are no runs, or too many.
    """
    _check(runs)
    data = pd.concat([run.curve[run.curve["measure"] == measure].assign(run=run.name) for run in runs], ignore_index=True)
    chance = runs[0].chance if measure == "balanced_accuracy" else 0.5
    panels = [WITH, WITHOUT] if len(runs) > 1 else [""]
    panels = [panel for panel in panels if not panel or (data["photograph"] == panel).any()]
    figure, axes = new_figure(1.9 * len(panels) + 0.75, len(panels), 1, sharex=True, sharey=True)
    for axis, panel in zip(axes, panels, strict=True):
        axis.axhline(chance, color=INK, linestyle=":", linewidth=1)
        of_panel = data[data["photograph"] == panel] if panel else data
        for (run, photograph), line in of_panel.groupby(["run", "photograph"], sort=False):
            # Of one run a colour tells the photograph, of several the run.
            place = [one.name for one in runs].index(str(run)) if panel else (WITH, WITHOUT).index(str(photograph))
            axis.fill_between(line["share"], line["low"], line["high"], color=COLOURS[place], alpha=0.2, linewidth=0)
            axis.plot(
                line["share"],
                line["value"],
                color=COLOURS[place],
                marker=MARKERS[place],
                markersize=3.5,
                label=run if panel else photograph,
            )
        axis.set_title(panel)
        axis.set_ylabel(MEASURE_NAMES[measure].replace(", one versus rest", ""))
    axes[-1].set_xlabel("recorded answers that are kept")
    axes[-1].xaxis.set_major_formatter(PercentFormatter(1))
    _legend(axes)
    first = runs[0]
    caption = (
        f"{len(first.image_ids):,} test photographs of {first.bootstrap.groups:,} {first.unit}s: of each form a share of the answers that "
        f"it has is kept, the others are removed as if nobody had asked (mean of {first.draws} random choices, the same for all runs, seed "
        f"{first.seed}). Bands: 95% intervals from {first.samples:,} resamples of the {first.unit}s; dotted: guessing. In practice answers "
        "are missing together and not at random: see the patterns."
    )
    words = []
    for (run, photograph), line in data.groupby(["run", "photograph"], sort=False):
        points = ", ".join(f"{value:.2f} at {share:.0%}" for share, value in zip(line["share"], line["value"], strict=True))
        words.append(f"{run} {photograph}: {points}")
    stem = "availability" if measure == "balanced_accuracy" else f"availability_{measure}"
    columns = ["run", "photograph", "share", "answers_kept", "draws", "measure", "value", "low", "high"]
    return Picture(stem, "With fewer answers", caption, f"{'; '.join(words)}. Guessing {chance:.2f}.", figure, data[columns])


@styled
def draw_patterns(runs: Sequence[Availability], measure: str = "balanced_accuracy") -> Picture:
    """Draw a measure for patterns of missing answers, with and without photograph, with 95% intervals.

    Args:
        runs: from `measure_availability`, at most four, of the same test images.
        measure: `balanced_accuracy` or `auc_macro_ovr`.

    Raises:
        ValueError: there are no runs, or too many.
    """
    _check(runs)
    data = pd.concat([run.patterns[run.patterns["measure"] == measure].assign(run=run.name) for run in runs], ignore_index=True)
    chance = runs[0].chance if measure == "balanced_accuracy" else 0.5
    series = list(data[["run", "photograph"]].drop_duplicates().itertuples(index=False, name=None))
    patterns = data.drop_duplicates("removed").sort_values("answers_kept", ascending=False, kind="stable")
    labels = [textwrap.fill(text, LETTERS) for text in patterns["pattern"]]
    heights = [max(LINE * (label.count("\n") + 1), SLOT * len(series)) + GAP for label in labels]
    figure, (axis,) = new_figure(sum(heights) + REST + SLOT * ((len(series) + 1) // 2))
    axis.axvline(chance, color=INK, linestyle=":", linewidth=1)
    middles, below = [], 0.0
    for removed, height in zip(patterns["removed"], heights, strict=True):
        middles.append(below + height / 2)
        for place, (run, photograph) in enumerate(series):
            row = data[(data["removed"] == removed) & (data["run"] == run) & (data["photograph"] == photograph)]
            y = below + height / 2 + SLOT * (place - (len(series) - 1) / 2)
            for one in row.to_dict("records"):
                axis.plot([one["low"], one["high"]], [y, y], color=COLOURS[place], linewidth=1.3)
                label = (f"{run}, {photograph}" if len(runs) > 1 else photograph) if removed == patterns["removed"].iloc[0] else None
                axis.plot(one["value"], y, MARKERS[place], color=COLOURS[place], markersize=4.2, label=label)
        below += height
    axis.set_ylim(below, 0)
    axis.set_yticks(middles, labels)
    axis.tick_params(axis="y", length=0, labelsize=7)
    axis.grid(visible=False, axis="y")
    axis.set_xlabel(MEASURE_NAMES[measure].replace(", one versus rest", ""))
    figure.legend(loc="outside lower center", ncols=1 if len(runs) > 1 else 2)
    first = runs[0]
    shown = patterns[patterns["training_share"].notna()]
    shares = "; ".join(f"{share:.0%}: {name}" for name, share in zip(shown["pattern"], shown["training_share"], strict=True))
    caption = (
        f"{len(first.image_ids):,} test photographs of {first.bootstrap.groups:,} {first.unit}s, with the answers that a pattern removes "
        f"removed from each form; lines: 95% intervals from {first.samples:,} resamples of the {first.unit}s (seed {first.seed}); dotted: "
        f"guessing. Patterns that training shows, with their share of its rows: {shares}."
    )
    words = [
        f"{row['run']}, {row['photograph']}, {row['pattern']}: {row['value']:.2f} [{row['low']:.2f}, {row['high']:.2f}]"
        for row in data.to_dict("records")
    ]
    stem = "patterns" if measure == "balanced_accuracy" else f"patterns_{measure}"
    columns = ["run", "photograph", "pattern", "removed", "training_share", "answers_kept", "measure", "value", "low", "high"]
    return Picture(stem, "With what is missing together", caption, "; ".join(words), figure, data[columns])


def _legend(axes: Sequence[Axes]) -> None:
    """Write the lines' names below the panels."""
    found = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure = axes[0].get_figure()
    assert figure is not None
    figure.legend(list(found.values()), list(found), loc="outside lower center", ncols=2)


def _check(runs: Sequence[Availability]) -> None:
    if not 1 <= len(runs) <= MOST:
        raise ValueError(f"one picture holds 1 to {MOST} runs, not {len(runs)}")
