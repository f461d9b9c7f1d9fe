from itertools import combinations

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.text import Text

from dualrefnet.analysis.cases import Disagreement
from dualrefnet.display.figure import FAINT, PRIMARY, SECONDARY, WIDTH, ReportFigure, inline_svg
from dualrefnet.evaluation.bootstrap import Difference

pytest.importorskip("captum")

from dualrefnet.analysis.cases import RIGHT, WRONG, ChosenCase, ShownCase, draw_disagreement, draw_gallery
from dualrefnet.analysis.gradcam import overlay
from dualrefnet.analysis.shap import MISSING_FLAGS

ANSWERS = [
    ("background_father", "BRAZIL", 0.124),
    (MISSING_FLAGS, "13 of 13", -0.31),
    ("skin_cancer_history", "not recorded, imputed", -0.021),
]
SHORT = ("ACK", "BCC", "MEL", "NEV", "SCC", "SEK", "DF", "VASC")
LONG = (
    "squamous cell carcinoma",
    "BASAL CELL CARCINOMA",
    "actinic keratosis",
    "melanocytic nevus",
    "dermatofibroma",
    "vascular",
    "x",
    "y",
)


def case(
    image_id: str,
    label: str,
    probabilities: dict[str, float],
    answers: list[tuple[str, str, float]] | None = None,
    seed: int = 0,
) -> ShownCase:
    generator = np.random.default_rng(seed)
    picture = generator.integers(0, 255, (32, 32, 3), dtype=np.uint8)
    heats = {name: generator.random((32, 32)).astype(np.float32) for name in probabilities}
    predicted = max(probabilities, key=lambda name: probabilities[name])
    chosen = ChosenCase(image_id, label, predicted, RIGHT if predicted == label else WRONG, probabilities)
    return ShownCase(chosen, picture, heats, None, answers or [])


def assert_readable(picture: ReportFigure) -> None:
    """Check that no text is cut off, smaller than 7 pt, or lies on another one or on a bar."""
    inline_svg(picture)
    figure = picture.figure
    assert figure.get_figwidth() == WIDTH
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    hidden = [
        tick for axis in figure.axes if not axis.axison for tick in (*axis.get_xticklabels(), *axis.get_yticklabels())
    ]
    texts = [text for text in figure.findobj(Text) if text.get_text() and text.get_visible() and text not in hidden]
    assert min(text.get_fontsize() for text in texts) >= 7
    boxes = [text.get_window_extent(renderer) for text in texts]
    for text, box in zip(texts, boxes, strict=True):
        assert max(-box.x0, -box.y0, box.x1 - figure.bbox.x1, box.y1 - figure.bbox.y1) < 1, text.get_text()
    bars = [patch.get_window_extent(renderer) for axis in figure.axes for patch in axis.patches]
    pictures = [axis.get_window_extent(renderer) for axis in figure.axes if axis.images]
    named = [(text.get_text(), box) for text, box in zip(texts, boxes, strict=True)]
    others = [("a bar", box) for box in bars if box.width > 0] + [("a photograph", box) for box in pictures]
    for (one, box), (other, second) in [*combinations(named, 2), *((text, area) for text in named for area in others)]:
        apart = (
            min(box.x1, second.x1) - max(box.x0, second.x0) < 1 or min(box.y1, second.y1) - max(box.y0, second.y0) < 2
        )
        assert apart, (one, other)


def words_of(axis: Axes) -> list[str]:
    return [text.get_text() for text in axis.texts]


def test_a_row_shows_photograph_heat_and_what_was_said() -> None:
    right = case("one", "BCC", {"ACK": 0.05, "BCC": 0.75, "MEL": 0.15, "NEV": 0.05}, ANSWERS)
    wrong = case("two", "BCC", {"ACK": 0.5, "BCC": 0.02, "MEL": 0.3, "NEV": 0.18}, seed=1)
    picture = draw_gallery([right, wrong], "BCC", "basal cell carcinoma")
    assert picture.name == "gallery_BCC"
    assert picture.title == "Photographs of BCC (basal cell carcinoma)"
    axes = picture.figure.axes
    assert len(axes) == 6
    for shown, (plain, heat, _) in zip((right, wrong), (axes[:3], axes[3:]), strict=True):
        assert (np.asarray(plain.images[0].get_array()) == shown.image).all()
        expected = overlay(shown.image, shown.saliency[shown.chosen.predicted])
        assert (np.asarray(heat.images[0].get_array()) == expected).all()
        assert plain.get_title(loc="left") == shown.chosen.kind
        assert heat.get_title(loc="left") == f"heat for {shown.chosen.predicted}"
    assert words_of(axes[2]) == [
        "BCC",
        "75% true",
        "MEL",
        "15%",
        "ACK",
        "5%",
        "+12  background_father = BRAZIL",
        "−31  fields missing: 13 of 13",
        "−2  skin_cancer_history = not",
        "     recorded, imputed",
    ]
    # The true class is there even where three others are likelier.
    assert words_of(axes[5]) == ["ACK", "50%", "MEL", "30%", "BCC", "2% true"]
    widths = [np.array([bar.get_width() for bar in axis.patches]) for axis in (axes[2], axes[5])]
    np.testing.assert_allclose(widths[0] / widths[0][0], np.array([75, 15, 5]) / 75)
    np.testing.assert_allclose(widths[1] / widths[0][0], np.array([50, 30, 2]) / 75)
    colours = [[to_hex(bar.get_facecolor()) for bar in axis.patches] for axis in (axes[2], axes[5])]
    assert colours == [[PRIMARY, FAINT, FAINT], [SECONDARY, FAINT, FAINT]]
    assert picture.alt == "surest right: called BCC with 75%; surest wrong: called ACK with 50%"
    assert "1 that it was surest of and right, 1 that it was surest of and wrong" in picture.caption
    assert_readable(picture)


def test_the_table_holds_every_probability_and_the_answers() -> None:
    right = case("one", "BCC", {"BCC": 0.75, "MEL": 0.25}, ANSWERS[:2])
    wrong = case("two", "BCC", {"BCC": 0.02, "MEL": 0.98})
    pd.testing.assert_frame_equal(
        draw_gallery([right, wrong], "BCC", "").data,
        pd.DataFrame(
            {
                "image_id": ["one", "two"],
                "label": ["BCC", "BCC"],
                "predicted": ["BCC", "MEL"],
                "kind": [RIGHT, WRONG],
                "prob_BCC": [0.75, 0.02],
                "prob_MEL": [0.25, 0.98],
                "answers": ["background_father = BRAZIL: +0.124; missing fields (flags) = 13 of 13: -0.310", ""],
            }
        ),
    )


@pytest.mark.parametrize("names", [SHORT, LONG, ("malignant", "benign")], ids=["short", "long", "two"])
def test_a_gallery_can_be_read_with_any_names_and_is_a_file(names: tuple[str, ...]) -> None:
    sure = {name: 0.995 if name == names[0] else 0.005 / (len(names) - 1) for name in names}
    wrong = {name: {0: 0.04, 1: 0.96}.get(place, 0.0) for place, name in enumerate(names)}
    rows = [case("one", names[0], sure, ANSWERS), case("two", names[0], wrong, ANSWERS), case("three", names[0], wrong)]
    picture = draw_gallery(rows, names[0], "")
    assert_readable(picture)
    assert_readable(draw_gallery(rows[:1], names[0], "with a name"))
    # The caption and the words for the blind have the whole name.
    assert names[1] in picture.alt
    assert draw_gallery(rows, "in situ / other", "").name == "gallery_in_situ_other"


def disagreement(rows: list[tuple[str, str, str, str, float, float]]) -> Disagreement:
    """Rows of image id, label, what A and B said, and how probable each held the true class."""
    table = pd.DataFrame(rows, columns=["image_id", "label", "predicted_a", "predicted_b", "p_true_a", "p_true_b"])
    table["kind"] = ["only_a_right" if row[1] == row[2] else "only_b_right" for row in rows]
    counts = {"both_right": 30, "only_a_right": 7, "only_b_right": 4, "both_wrong": 9}
    return Disagreement(table, table, counts, 0.6, 0.5, Difference(0.1, -0.1, 0.3, 0.4, 100), 40, 0, 0)


def test_each_row_of_a_disagreement_says_who_was_right() -> None:
    found = disagreement([("one", "MEL", "MEL", "NEV", 0.8, 0.15), ("two", "BCC", "ACK", "BCC", 0.2, 0.9)])
    first = [case("one", "MEL", {"MEL": 0.8, "NEV": 0.2}), case("two", "BCC", {"ACK": 0.7, "BCC": 0.2}, seed=1)]
    second = [
        case("one", "MEL", {"MEL": 0.15, "NEV": 0.85}, seed=2),
        case("two", "BCC", {"ACK": 0.1, "BCC": 0.9}, seed=3),
    ]
    picture = draw_disagreement(found, list(zip(first, second, strict=True)), ("DualRefNet", "MetaBlock"))
    axes = picture.figure.axes
    assert [axis.get_title(loc="left") for axis in axes] == [
        "true: MEL",
        "DualRefNet\nMEL, right; MEL 80%",
        "MetaBlock\nNEV, wrong; MEL 15%",
        "true: BCC",
        "DualRefNet\nACK, wrong; BCC 20%",
        "MetaBlock\nBCC, right; BCC 90%",
    ]
    drawn = [np.asarray(axis.images[0].get_array()) for axis in axes]
    expected = [
        first[0].image,
        overlay(first[0].image, first[0].saliency["MEL"]),
        overlay(second[0].image, second[0].saliency["NEV"]),
        first[1].image,
        overlay(first[1].image, first[1].saliency["ACK"]),
        overlay(second[1].image, second[1].saliency["BCC"]),
    ]
    assert all((one == other).all() for one, other in zip(drawn, expected, strict=True))
    assert picture.alt == (
        "true MEL: DualRefNet says MEL, 80% for MEL; true MEL: MetaBlock says NEV, 15% for MEL; "
        "true BCC: DualRefNet says ACK, 20% for BCC; true BCC: MetaBlock says BCC, 90% for BCC"
    )
    assert "both are right on 30, only DualRefNet on 7, only MetaBlock on 4, none on 9" in picture.caption
    assert "reads no photograph" not in picture.caption
    assert picture.data.to_dict("list") == {
        "image_id": ["one", "one", "two", "two"],
        "label": ["MEL", "MEL", "BCC", "BCC"],
        "run": ["DualRefNet", "MetaBlock"] * 2,
        "predicted": ["MEL", "NEV", "ACK", "BCC"],
        "probability_of_true_class": [0.8, 0.15, 0.2, 0.9],
    }
    assert_readable(picture)


def test_a_run_that_reads_no_photograph_has_no_heat() -> None:
    found = disagreement([("one", "MEL", "MEL", "NEV", 0.8, 0.15)])
    first = case("one", "MEL", {"MEL": 0.8, "NEV": 0.2})
    picture = draw_disagreement(found, [(first, None)], ("DualRefNet", "Metadata only"))
    drawn = [np.asarray(axis.images[0].get_array()) for axis in picture.figure.axes]
    assert (drawn[2] == first.image).all()
    assert not (drawn[1] == first.image).all()
    assert picture.caption.endswith("Metadata only reads no photograph, so it has no heat.")


def test_a_disagreement_can_be_read_with_long_names_of_classes_and_runs() -> None:
    runs = (
        "pad_ufes_20-dualrefnet-efficientnet_lite0-metadata-R-fold4-seed0",
        "pad_ufes_20-dualrefnet-efficientnet_lite0-metadata-R-fold4-seed1",
    )
    label, other = LONG[:2]
    found = disagreement([("one", label, label, other, 1.0, 0.0), ("two", other, label, other, 0.0, 1.0)])
    cases = [case("one", label, {label: 0.9, other: 0.1}), case("two", other, {label: 0.9, other: 0.1})]
    picture = draw_disagreement(found, [(one, one) for one in cases], runs)
    assert_readable(picture)
    # They differ in their last letter only, which is to be seen.
    titles = [axis.get_title(loc="left") for axis in picture.figure.axes]
    assert titles[1].split(", ")[0] != titles[2].split(", ")[0]
    assert "".join(titles[1].splitlines()[:-2]) == runs[0]
