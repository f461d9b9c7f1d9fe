"""Pictures of Shapley values: the drawn numbers by hand, words that are never cut off, and eight classes with long
names.
"""

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle

from dualrefnet.analysis.shap import (
    LOW_TO_HIGH,
    MISSING_FLAGS,
    OTHER,
    FeatureGroup,
    MetadataShap,
    draw_beeswarm,
    draw_importance,
    draw_waterfall,
)
from dualrefnet.display.figure import COLOURS, ReportFigure, beeswarm_offsets, inline_svg, rank_colour_scale, styled
from readable import assert_readable

NAMES = ("MEL", "NV", "BCC", "AK", "seborrhoeic keratosis", "DF", "melanoma, invasive", "squamous cell carcinoma")


def small(reads_image: bool = True) -> MetadataShap:
    """Three images, three players, two classes."""
    first = np.array([[0.10, -0.02, 0.30], [-0.20, 0.04, 0.20], [0.30, 0.06, -0.10]])
    values = np.stack([first, -first], axis=2)
    base = np.array([[0.4, 0.6], [0.5, 0.5], [0.3, 0.7]])
    return MetadataShap(
        values=values.astype(np.float32),
        errors=(np.abs(values) / 10).astype(np.float32),
        base=base.astype(np.float32),
        prediction=(base + values.sum(axis=1)).astype(np.float32),
        players=(
            FeatureGroup("age", "age", "numeric", (0,)),
            FeatureGroup("skin_cancer_history", "skin_cancer_history", "boolean", (1, 2)),
            FeatureGroup(MISSING_FLAGS, MISSING_FLAGS, "missing", (3,)),
        ),
        classes=("malignant", "benign"),
        image_ids=("one", "two", "three"),
        labels=np.array([1, 0, 1]),
        words=(
            ("66 years", "yes", "0 of 1"),
            ("40 years", "not recorded, imputed", "1 of 1"),
            ("50 years", "no", "0 of 1"),
        ),
        colours=np.array([[1.5, 1, 0], [-1, np.nan, 1], [0, 0, 0]], np.float32),
        answered=np.array([[True, True, True], [True, False, True], [True, True, True]]),
        by="field",
        side="test",
        images_in_all=3 if reads_image else 30,
        background=50,
        permutations=10,
        seed=4,
        reads_image=reads_image,
    )


def large(classes: int, players: int, images: int = 120) -> MetadataShap:
    """As many classes and players as a page may have to hold, with long names."""
    generator = np.random.default_rng(classes)
    values = generator.normal(size=(images, players, classes)) * generator.exponential(0.05, size=(1, players, 1))
    values -= values.mean(axis=2, keepdims=True)
    names = ["skin_cancer_history", "background_father", "anatom_site_general", "age", "background_mother"]
    every = [
        FeatureGroup(f"{names[number % 5]}{number // 5 or ''}", "f", "categorical", (number,))
        for number in range(players - 1)
    ]
    words = ["not recorded, imputed", "NETHERLANDS", "lower extremity", "85 years", "CZECH"]
    base = np.full((images, classes), 1 / classes)
    return MetadataShap(
        values=values.astype(np.float32),
        errors=np.full(values.shape, 0.004, np.float32),
        base=base.astype(np.float32),
        prediction=(base + values.sum(axis=1)).astype(np.float32),
        players=(*every, FeatureGroup(MISSING_FLAGS, MISSING_FLAGS, "missing", (players - 1,))),
        classes=NAMES[:classes],
        image_ids=tuple(f"ISIC_{number:07d}" for number in range(images)),
        labels=generator.integers(classes, size=images),
        words=((*(words[number % 5] for number in range(players - 1)), "13 of 13"),) * images,
        colours=np.where(np.arange(players) % 2, generator.normal(size=(images, players)), np.nan).astype(np.float32),
        answered=generator.random((images, players)) < 0.8,
        by="field",
        side="test",
        images_in_all=5066,
        background=50,
        permutations=1,
        seed=0,
        reads_image=True,
    )


@styled
def assert_readable_bars(picture: ReportFigure) -> None:
    """As `assert_readable`; and the numbers beside the bars stay clear of the players' names."""
    assert_readable(picture)
    figure = picture.figure
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    # The numbers beside the bars stay on the side of the bars, not on the players' names.
    for text in figure.axes[0].texts:
        assert text.get_window_extent(renderer).x0 > figure.axes[0].bbox.x0 - 1, text.get_text()
    assert picture.caption.endswith(".")
    assert 1 <= picture.caption.count(". ") + 1 <= 5
    assert picture.alt.endswith(".")
    svg = inline_svg(picture)
    assert f"{picture.name}-" in svg
    assert "$" not in svg


@pytest.mark.parametrize(("classes", "players"), [(2, 3), (6, 22), (8, 22), (8, 93)])
def test_every_picture_is_readable_with_few_and_many_classes_and_players(classes: int, players: int) -> None:
    result = large(classes, players)
    moved = result.values[:, :, 0].sum(axis=1)
    extremes = {0, int(moved.argmin()), int(moved.argmax())}
    pictures = [draw_importance(result), *(draw_beeswarm(result, label) for label in result.classes[-2:])]
    pictures += [
        draw_waterfall(result, result.image_ids[row], label)
        for row in extremes
        for label in (NAMES[0], result.classes[-1])
    ]
    for picture in pictures:
        assert_readable_bars(picture)
    assert len({picture.name for picture in pictures}) == len(pictures)


def test_importance_is_the_mean_of_the_absolute_values_in_percentage_points() -> None:
    picture = draw_importance(small())
    assert_readable_bars(picture)
    lines = picture.data.set_index(["player", "class"])["points"]
    # |0.3| + |0.2| + |0.1| over three images; the second class mirrors the first.
    for player, points in ((MISSING_FLAGS, 20.0), ("age", 20.0), ("skin_cancer_history", 4.0)):
        assert lines[player, "malignant"] == pytest.approx(points, rel=1e-5)
        assert lines[player, "benign"] == pytest.approx(points, rel=1e-5)
    axis = picture.figure.axes[0]
    assert [text.get_text() for text in axis.texts] == ["40.0", "40.0", "8.0"]
    names = [label.get_text() for label in axis.get_yticklabels()]
    assert sorted(names[:2]) == sorted([MISSING_FLAGS, "age"])
    hatched = {round(bar.get_y() + bar.get_height() / 2) for bar in axis.patches if bar.get_hatch()}
    assert hatched == {names.index(MISSING_FLAGS)}
    assert "all 3 test images" in picture.caption
    assert "Hatched bars are no answers" in picture.caption
    assert "40.0" in picture.alt


def test_the_small_ones_are_added_up_and_not_drawn_where_they_would_dwarf_the_others() -> None:
    result = large(3, 93)
    picture = draw_importance(result)
    expected = 100 * np.abs(result.values).mean(axis=0)
    order = np.argsort(-expected.sum(axis=1))
    others = picture.data[picture.data["player"] == "78 others"].set_index("class")["points"]
    for number, label in enumerate(result.classes):
        assert others[label] == pytest.approx(expected[order[15:], number].sum(), rel=1e-4)
    assert picture.data["player"].nunique() == 16
    written = [text.get_text() for text in picture.figure.axes[0].texts]
    assert written[-1] == f"{others.sum():.1f} together, too long to draw"
    assert len(picture.figure.axes[0].patches) == 15 * 3
    few = draw_importance(large(3, 16))
    assert few.data["player"].nunique() == 16
    assert not few.data["player"].str.endswith("others").any(), "one player isn't 'others'"


def test_a_beeswarm_has_a_point_for_every_image_and_colours_only_what_was_answered() -> None:
    picture = draw_beeswarm(small(), "malignant")
    assert_readable_bars(picture)
    assert picture.data.groupby("player", sort=False)["points"].apply(list).to_dict() == {
        "age": pytest.approx([10, -20, 30], rel=1e-5),
        MISSING_FLAGS: pytest.approx([30, 20, -10], rel=1e-5),
        "skin_cancer_history": pytest.approx([-2, 4, 6], rel=1e-5),
    }
    lines = [line for line in picture.figure.axes[0].lines if line.get_linestyle() == "None"]
    looks: dict[float, Line2D] = {}
    for line in lines:
        for value in line.get_xdata():
            looks.setdefault(round(float(value), 3), line)
    assert len([value for line in lines for value in line.get_xdata()]) == 9
    assert to_hex(looks[10.0].get_color()) == to_hex(LOW_TO_HIGH(1.0)) == COLOURS[1], "the oldest"
    assert to_hex(looks[4.0].get_color()) == OTHER
    assert looks[4.0].get_markerfacecolor() == "none", "no answer"
    assert to_hex(looks[-2.0].get_color()) == to_hex(looks[-2.0].get_markerfacecolor()) == COLOURS[1], "yes"
    assert to_hex(looks[6.0].get_color()) == COLOURS[0], "no"
    assert {looks[value].get_marker() for value in (-10.0,)} == {"D"}
    assert looks[10.0].get_marker() == "o"
    assert [text.get_text() for legend in picture.figure.legends for text in legend.get_texts()] == ["not recorded"]
    assert picture.name == "shap_beeswarm_field_malignant"


def test_a_waterfall_leads_from_the_base_to_the_prediction_with_every_answer_in_words() -> None:
    picture = draw_waterfall(small(), "two", "malignant")
    assert_readable_bars(picture)
    steps = picture.data
    assert steps["player"].tolist() == ["age", MISSING_FLAGS, "skin_cancer_history"]
    assert steps["points"].tolist() == pytest.approx([-20, 20, 4], rel=1e-5)
    assert steps["start"].tolist() == pytest.approx([50, 30, 50], rel=1e-5)
    assert steps["end"].tolist() == pytest.approx([30, 50, 54], rel=1e-5)
    axis = picture.figure.axes[0]
    assert [label.get_text() for label in axis.get_yticklabels()] == [
        "this photograph,\nother patients' forms",
        "age = 40 years",
        f"{MISSING_FLAGS} =\n1 of 1",
        "skin_cancer_history =\nnot recorded, imputed",
        "with this patient's form",
    ]
    assert [text.get_text() for text in axis.texts] == ["−20.0", "+20.0", "+4.0", "50.0 %", "54.0 %"]
    bars = [bar for bar in axis.patches if isinstance(bar, Rectangle)]
    assert [bool(bar.get_hatch()) for bar in bars] == [False, True, False]
    assert len({to_hex(bar.get_facecolor()) for bar in bars}) == 2
    assert "truth: malignant" in picture.caption
    assert "50 training forms" in picture.caption
    # Twice the largest standard error, a tenth of 20 points.
    assert "good to about 4.0 points" in picture.caption
    assert "skin_cancer_history = not recorded, imputed +4.0" in picture.alt
    assert "What is not recorded" not in draw_waterfall(small(), "one", "malignant").caption


def test_the_last_step_of_a_waterfall_holds_all_others() -> None:
    result = large(6, 22)
    picture = draw_waterfall(result, result.image_ids[7], "BCC")
    assert len(picture.data) == 10
    assert picture.data["player"].iloc[-1] == "13 others"
    values = 100 * result.values[7, :, 2]
    order = np.argsort(-np.abs(values))
    np.testing.assert_allclose(
        picture.data["points"], [*values[order[:9]], values[order[9:]].sum()], rtol=1e-4, atol=1e-4
    )
    assert picture.data["end"].iloc[-1] == pytest.approx(100 * result.prediction[7, 2], rel=1e-4)
    assert len(draw_waterfall(large(2, 10), "ISIC_0000000", "NV").data) == 10, "one player isn't 'others'"


def test_without_a_photograph_the_words_name_none() -> None:
    result = small(reads_image=False)
    pictures = [draw_importance(result), draw_beeswarm(result, "benign"), draw_waterfall(result, "one", "benign")]
    for picture in pictures:
        assert "photograph" not in picture.caption
    labels = pictures[2].figure.axes[0].get_yticklabels()
    assert labels[0].get_text() == "other patients' forms"
    assert "3 of 30 test images, each class in proportion, seed 4" in pictures[0].caption


def test_an_image_or_class_that_is_not_there_is_an_error() -> None:
    with pytest.raises(ValueError, match="not in tuple"):
        draw_waterfall(small(), "four", "benign")
    with pytest.raises(ValueError, match="not in tuple"):
        draw_beeswarm(small(), "unknown")


def test_colours_go_from_the_fifth_to_the_ninetyfifth_percentile_and_keep_what_is_unknown_unknown() -> None:
    amount = np.append(np.arange(101), np.nan).astype(np.float32)
    result = rank_colour_scale(amount)
    assert result[[0, 5, 50, 95, 100]].tolist() == pytest.approx([0, 0, 0.5, 1, 1])
    assert np.isnan(result[101])
    rare = np.zeros(100, np.float32)
    rare[3] = 1
    assert rank_colour_scale(rare).tolist() == rare.tolist()
    assert rank_colour_scale(np.array([7, 7, np.nan], np.float32))[:2].tolist() == [0.5, 0.5]
    assert np.isnan(rank_colour_scale(np.full(3, np.nan, np.float32))).all()


def test_points_of_one_value_stand_beside_each_other_from_the_middle_outwards() -> None:
    heights = beeswarm_offsets(np.array([1, 1, 1, 5, 1], np.float32), 0.1)
    assert heights.tolist() == pytest.approx([0, -0.09, 0.09, 0, -0.18])
    crowd = beeswarm_offsets(np.zeros(301, np.float32), 0.1)
    assert np.abs(crowd).max() == pytest.approx(0.4)
    assert len(np.unique(crowd)) == 301
