"""Pictures of the fused features: the map of the test images, and how well their classes are apart."""

from __future__ import annotations

import textwrap

import pandas as pd
from matplotlib.axes import Axes

from dualrefnet.explain.embedding import Embedding, EmbeddingComparison
from dualrefnet.explain.separation import MEASURES
from dualrefnet.figures.picture import FAINT, PRIMARY, SECONDARY, Picture, class_colours, class_markers, new_figure, styled

# Letters that fit into a line: of a panel's title, of the legend.
TITLE, LEGEND = 44, 52
_KNN = "knn_balanced_accuracy"


@styled
def draw_embedding(a: Embedding, b: Embedding | None = None) -> Picture:
    """Draw the map of a run's test images, or of two runs' one above the other.

    Args:
        a: a run.
        b: another one, on the same images (`EmbeddingComparison`).
    """
    maps = [a] if b is None else [a, b]
    shown = [name for name in a.classes if (a.table["class"] == name).any()]
    columns = max(1, min(4, 40 // max(len(name) + 4 for name in shown)))
    figure, axes = new_figure(3.1 * len(maps) + 0.2 + 0.16 * -(-len(shown) // columns), len(maps))
    for axis, run in zip(axes, maps, strict=True):
        _draw_map(axis, run)
        numbers = f"silhouette {run.value('silhouette').value:.2f}, neighbours {run.value(_KNN).value:.2f}".replace("-", "−")
        axis.set_title(f"{_wrap(run.name, TITLE)}\n{numbers}")
    handles, labels = axes[0].get_legend_handles_labels()
    order = [labels.index(name) for name in shown]
    figure.legend([handles[place] for place in order], shown, loc="outside lower center", ncols=columns, markerscale=1.6, handletextpad=0.1)
    few = "all" if len(a.table) == a.images else f"{len(a.table)} (each class in proportion, seed {a.seed}) of the"
    which = "test images" if b is None else "images that both runs were tested on"
    said = "; ".join(f"{run.name}: " + ", ".join(f"{MEASURES[name]} {_interval(run, name)}" for name in MEASURES) for run in maps)
    caption = (
        f"Each mark is a test image, {few} {a.images} {which} of {a.separation.groups} {a.unit}; images near each other have similar fused "
        "features (the vector that is classified), but axes, sizes of clusters and distances between them mean nothing in such a map "
        "(t-SNE). The numbers are measured on the features themselves: the silhouette says how much nearer images are to their own class "
        f"than to the next (−1 to 1), and the neighbours are the nearest images of other {a.unit} (chance {1 / len(shown):.2f}). {said}. "
        f"{_intervals(a)}"
    )
    alt = f"Map of {len(a.table)} test images of {len(shown)} classes. {said}."
    name = "embedding" if b is None else "embeddings"
    return Picture(name, "Fused features of the test images", caption, alt, figure, pd.concat([run.table for run in maps]))


@styled
def draw_separation(comparison: EmbeddingComparison) -> Picture:
    """Draw silhouettes and nearest neighbours of two runs on the same images, with intervals."""
    runs = (comparison.first, comparison.second)
    figure, axes = new_figure(3.1, len(MEASURES))
    chance = 1 / runs[0].table["class"].nunique()
    rows = []
    for axis, (measure, words) in zip(axes, MEASURES.items(), strict=True):
        axis.axvline(chance if measure == _KNN else 0, color=FAINT, linewidth=1)
        for place, (run, colour, marker) in enumerate(zip(runs, (PRIMARY, SECONDARY), ("o", "s"), strict=True)):
            found = run.value(measure)
            axis.plot([found.low, found.high], [place, place], color=colour)
            axis.plot([found.value], [place], marker, color=colour, markersize=5, label=_wrap(run.name, LEGEND))
            rows.append({"run": run.name, "measure": measure, "value": found.value, "low": found.low, "high": found.high})
        axis.set_title(words[0].upper() + words[1:])
        axis.set_ylim(1.6, -0.6)
        # The numbers stand where they can't meet a dot.
        axis.yaxis.tick_right()
        axis.set_yticks([0, 1], [_interval(run, measure) for run in runs])
        axis.tick_params(axis="y", length=0)
        axis.spines["left"].set_visible(False)
        axis.grid(visible=False, axis="y")
        axis.margins(x=0.08)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=1)
    first = runs[0]
    caption = (
        f"How well the classes are apart in the features that are classified, of two runs on the same {len(first.table)} test images of "
        f"{first.separation.groups} {first.unit}; further right is better. Grey line: 0 for the silhouette, chance ({chance:.2f}) for the "
        f"neighbours, which are the nearest images of other {first.unit}. {comparison.conclusion()} {_intervals(first)}"
    )
    alt = " ".join(comparison.sentence(measure) for measure in MEASURES)
    return Picture("separation", "How well the classes are apart", caption, alt, figure, pd.DataFrame(rows))


def _draw_map(axis: Axes, run: Embedding) -> None:
    colours, markers = class_colours(run.classes), class_markers(run.classes)
    # Rare classes on top.
    for name in run.table["class"].value_counts().index:
        rows = run.table[run.table["class"] == name]
        size = 9 if len(run.table) > 600 else 14
        axis.scatter(rows["x"], rows["y"], s=size, color=colours[name], marker=markers[name], alpha=0.8, linewidths=0, label=name)
    axis.set_xticks([])
    axis.set_yticks([])
    for spine in axis.spines.values():
        spine.set(visible=True, color=FAINT)


def _wrap(name: str, width: int) -> str:
    return "\n".join(textwrap.wrap(name, width))


def _interval(run: Embedding, measure: str) -> str:
    found = run.value(measure)
    return f"{found.value:.3f} [{found.low:.3f}, {found.high:.3f}]".replace("-", "−")


def _intervals(run: Embedding) -> str:
    return f"In brackets: 95% intervals from resampling {run.unit}, in which every image keeps its neighbours."
