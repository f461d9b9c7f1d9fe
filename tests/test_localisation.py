from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from dualrefnet.analysis.opened_run import OpenedRun, open_run
from dualrefnet.data.images import read_mask
from dualrefnet.errors import DataError, RunError
from dualrefnet.run import Run

pytest.importorskip("captum")

from dualrefnet.analysis.gradcam import (
    Localisation,
    centred_gaussian,
    draw_localisation,
    energy_inside,
    gradcam,
    localise,
    pointing_game,
    summarise,
)


@pytest.fixture(scope="module")
def opened(tiny_run: Run) -> OpenedRun:
    return open_run(tiny_run)


@pytest.fixture(scope="module")
def result(opened: OpenedRun) -> Localisation:
    return localise(opened, samples=200)


def square(side: int, *places: tuple[int, int]) -> np.ndarray:
    mask = np.zeros((1, side, side), dtype=bool)
    for place in places:
        mask[0][place] = True
    return mask


def test_heat_that_is_the_mask_lies_wholly_in_it() -> None:
    mask = square(8, (2, 3), (2, 4), (5, 5))
    assert energy_inside(7.0 * mask, mask).tolist() == [1.0]
    assert energy_inside(7.0 * ~mask, mask).tolist() == [0.0]
    assert pointing_game(7.0 * mask, mask).tolist() == [1.0]
    assert pointing_game(7.0 * ~mask, mask).tolist() == [0.0]


@given(arrays(bool, (2, 6, 6)))
def test_even_heat_has_the_share_of_the_area_in_both_measures(mask: np.ndarray) -> None:
    heat = np.full((2, 6, 6), 0.3)
    np.testing.assert_allclose(energy_inside(heat, mask), mask.mean(axis=(1, 2)))
    np.testing.assert_allclose(pointing_game(heat, mask), mask.mean(axis=(1, 2)))


@given(
    arrays(np.float64, (1, 5, 5), elements=st.floats(0, 1, width=32)), arrays(bool, (1, 5, 5)), st.floats(0.01, 1000)
)
def test_measures_depend_on_shares_alone_and_mask_and_rest_add_up(
    heat: np.ndarray, mask: np.ndarray, factor: float
) -> None:
    np.testing.assert_allclose(energy_inside(factor * heat, mask), energy_inside(heat, mask), equal_nan=True)
    if heat.any():
        np.testing.assert_allclose(energy_inside(heat, mask) + energy_inside(heat, ~mask), 1)
        np.testing.assert_allclose(pointing_game(heat, mask) + pointing_game(heat, ~mask), 1)


def test_without_heat_there_is_no_share_and_the_game_is_lost() -> None:
    mask, heat = square(4, (0, 0)), np.zeros((1, 4, 4))
    assert np.isnan(energy_inside(heat, mask)).all()
    assert pointing_game(heat, mask).tolist() == [0.0]
    assert pointing_game(heat, np.ones_like(mask)).tolist() == [0.0]


def test_the_hottest_place_decides_the_game_and_equal_ones_share_it() -> None:
    heat = np.array([[[1.0, 2.0], [3.0, 0.5]]])
    assert pointing_game(heat, square(2, (1, 0))).tolist() == [1.0]
    assert pointing_game(heat, square(2, (0, 0), (0, 1), (1, 1))).tolist() == [0.0]
    # What rounding made of equal values is equal.
    heat[0, 0, 1] = 3.0 - 1e-7
    assert pointing_game(heat, square(2, (1, 0))).tolist() == [0.5]


@pytest.mark.parametrize("side", [7, 32])
def test_the_spot_is_round_in_the_middle_and_a_quarter_of_the_side_wide(side: int) -> None:
    spot = centred_gaussian(side)
    assert spot.max() == 1
    for turned in (spot.T, spot[::-1], spot[:, ::-1]):
        np.testing.assert_array_equal(turned, spot)
    # exp(-d^2 / (2 (side / 4)^2)), one pixel further.
    middle = side // 2
    first = ((side - 1) / 2 - middle) ** 2
    second = ((side - 1) / 2 - middle - 1) ** 2
    assert spot[middle, middle + 1] / spot[middle, middle] == pytest.approx(
        np.exp(-(second - first) / (2 * (side / 4) ** 2))
    )
    # Of an even side four pixels are the middle.
    mask = square(side, (middle, middle))
    assert pointing_game(spot[None], mask).tolist() == [1.0 if side % 2 else 0.25]


def table_of(energy: list[float], labels: str) -> pd.DataFrame:
    count = len(energy)
    return pd.DataFrame(
        {
            "image_id": [f"i{number}" for number in range(count)],
            "label": list(labels),
            "predicted": "A",
            "energy": energy,
            "energy_baseline": np.linspace(0.1, 0.4, count),
            "pointing": [1.0, 0.0] * (count // 2),
            "pointing_baseline": 1.0,
            "area": np.linspace(0.0, 0.3, count),
        }
    )


def test_means_leave_undefined_shares_out_of_their_row_only() -> None:
    table = table_of([0.5, np.nan, 0.7, 0.1], "ABBA")
    summary = summarise(table, np.array(["p", "p", "q", "r"]), ("A", "B", "C"), samples=100).set_index(
        ["class", "measure"]
    )
    assert list(summary.index) == [
        (name, measure) for name in ("all images", "A", "B") for measure in ("energy", "pointing")
    ]
    energy = summary.loc[("all images", "energy")]
    assert (energy["images"], energy["patients"]) == (3, 3)
    # Of images 0, 2, 3 alone: baselines .1, .3, .4 and areas 0, .2, .3.
    assert energy["value"] == pytest.approx(1.3 / 3)
    assert energy["baseline"] == pytest.approx(0.8 / 3)
    assert energy["difference"] == pytest.approx(0.5 / 3)
    assert energy["area"] == pytest.approx(0.5 / 3)
    pointing = summary.loc[("all images", "pointing")]
    assert (pointing["images"], pointing["value"], pointing["difference"]) == (4, 0.5, -0.5)
    assert summary.loc[("B", "energy"), ["images", "patients", "value"]].tolist() == [1, 1, 0.7]
    # One patient says nothing of others.
    assert np.isnan(summary.loc[("B", "energy"), "low"])
    assert not np.isnan(summary.loc[("B", "pointing"), "low"])


def test_intervals_are_those_of_laid_out_samples_of_patients() -> None:
    random = np.random.default_rng(5)
    table = table_of(list(random.uniform(0, 1, 40)), "AB" * 20)
    patients = np.array([f"p{number}" for number in random.integers(0, 12, 40)])
    summary = summarise(table, patients, ("A", "B"), samples=300, seed=2).set_index(["class", "measure"])
    names = list(dict.fromkeys(patients))
    generator = np.random.default_rng(2)
    drawn: dict[str, list[dict[str, float]]] = {"all images": [], "B": []}
    for _ in range(300):
        sample = pd.concat(
            [table[patients == names[number]] for number in generator.integers(len(names), size=len(names))]
        )
        for name, part in (("all images", sample), ("B", sample[sample["label"] == "B"])):
            drawn[name].append(
                {
                    "": part["energy"].mean(),
                    "baseline_": part["energy_baseline"].mean(),
                    "difference_": (part["energy"] - part["energy_baseline"]).mean(),
                    "area_": part["area"].mean(),
                }
            )
    for name, values in drawn.items():
        for prefix, column in pd.DataFrame(values).items():
            row = summary.loc[(name, "energy")]
            np.testing.assert_allclose(
                row[[f"{prefix}low", f"{prefix}high"]].astype(float), np.quantile(column.dropna(), [0.025, 0.975])
            )


def test_no_samples_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        summarise(table_of([0.1, 0.2], "AB"), np.array(["p", "q"]), ("A", "B"), samples=0)


def test_a_run_is_measured_on_all_test_images_with_their_own_masks(opened: OpenedRun, result: Localisation) -> None:
    test = opened.rows("test").set_index("image_id")
    assert list(result.table["image_id"]) == list(test.index)
    assert result.images == result.with_mask == len(test)
    assert result.table["label"].tolist() == test["label"].tolist()
    assert (result.empty_masks, result.map_sides) == (0, (1,))
    # A map of one place is even heat: the share of the area, or none at all.
    seen = result.table["energy"].notna()
    assert result.empty_heats == (~seen).sum() < len(test)
    np.testing.assert_allclose(result.table["energy"][seen], result.table["area"][seen], rtol=1e-5)
    np.testing.assert_allclose(result.table["pointing"], np.where(seen, result.table["area"], 0), rtol=1e-5)
    for image_id, area in zip(result.table["image_id"], result.table["area"], strict=True):
        mask = cv2.imread(str(opened.dataset.root / "masks" / f"{image_id}.png"), cv2.IMREAD_GRAYSCALE) > 127
        assert area == pytest.approx(mask.mean(), abs=0.02)
    assert result.table["energy_baseline"].mean() > result.table["area"].mean(), "drawn lesions lie in the middle"
    whole = result.summary.iloc[0]
    assert whole["patients"] == opened.groups.loc[list(test.index[seen])].nunique()


def test_heat_is_that_of_the_class_that_the_run_predicted(opened: OpenedRun, result: Localisation) -> None:
    predictions = opened.run.predictions.set_index("image_id").loc[result.table["image_id"]]
    assert result.table["predicted"].tolist() == predictions["predicted"].tolist()
    examples = opened.pictures("test")
    batch = examples.batch(np.arange(len(examples)))
    targets = torch.tensor([opened.classes.index(name) for name in result.table["predicted"]])
    heat = gradcam(opened.model, opened.images(batch), batch.metadata, targets).heat.double().numpy()
    paths = opened.rows("test")["image_path"]
    masks = [
        read_mask(opened.dataset.root / "masks" / f"{name}.png", Path(path), 32, "squash")
        for name, path in zip(examples.image_ids, paths, strict=True)
    ]
    np.testing.assert_allclose(result.table["energy"], energy_inside(heat, np.stack(masks)), rtol=1e-4)


def test_a_sample_of_the_images_is_the_same_again_and_has_every_class(opened: OpenedRun) -> None:
    told: list[tuple[int, int]] = []
    first, again = (
        localise(opened, images=18, samples=20, seed=3, progress=lambda *done: told.append(done)) for _ in range(2)
    )
    pd.testing.assert_frame_equal(first.table, again.table)
    pd.testing.assert_frame_equal(first.summary, again.summary)
    assert len(first.table) == 18
    assert set(first.table["label"]) == set(opened.rows("test")["label"])
    assert told == [(16, 18), (18, 18)] * 2
    other = localise(opened, images=18, samples=20, seed=4)
    assert list(other.table["image_id"]) != list(first.table["image_id"])


def test_images_without_a_mask_and_empty_masks_are_counted_and_left_out(opened: OpenedRun, tmp_path: Path) -> None:
    names = list(opened.rows("test")["image_id"])[:10]
    for number, name in enumerate(names):
        mask = np.zeros((20, 20), dtype=np.uint8)
        mask[5:15, 5:15] = 0 if number in (3, 7) else 255
        cv2.imwrite(str(tmp_path / f"{name}.png"), mask)
    result = localise(opened, tmp_path, samples=20)
    assert list(result.table["image_id"]) == [name for number, name in enumerate(names) if number not in (3, 7)]
    assert (result.with_mask, result.empty_masks) == (10, 2)
    np.testing.assert_allclose(result.table["area"], 0.25, atol=0.02)
    for name in names:
        cv2.imwrite(str(tmp_path / f"{name}.png"), np.zeros((20, 20), dtype=np.uint8))
    with pytest.raises(DataError, match="all masks of the 10 test images that have one are empty"):
        localise(opened, tmp_path)


def test_without_masks_the_error_says_where_they_should_be(opened: OpenedRun, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"there is no folder of masks .*nowhere"):
        localise(opened, tmp_path / "nowhere")
    cv2.imwrite(str(tmp_path / "another.png"), np.full((20, 20), 255, dtype=np.uint8))
    with pytest.raises(DataError, match="none of the test images has a mask"):
        localise(opened, tmp_path)


def test_a_run_without_images_has_nothing_to_localise(opened: OpenedRun) -> None:
    from dualrefnet.models.registry import METHODS

    class Blind(METHODS["dualrefnet"].network):  # type: ignore[misc]
        title, reads_image = "Blind", False

    with pytest.raises(RunError, match="Blind reads no image"):
        localise(replace(opened, model=Blind.__new__(Blind)))


def drawn_result(energy: list[float]) -> Localisation:
    table = table_of(energy, "AABBAABB")
    summary = summarise(table, np.array(list("ppqqrrss")), ("A", "B"), samples=50)
    return Localisation(table, summary, 12, 9, 1, int(np.isnan(energy).sum()), (7,), 50, 0)


def test_the_drawn_dots_are_the_numbers_of_the_summary() -> None:
    result = drawn_result([0.5, np.nan, 0.7, 0.1, 0.2, 0.3, 0.9, 0.4])
    picture = draw_localisation(result)
    pd.testing.assert_frame_equal(picture.data, result.summary)
    for axis, measure in zip(picture.figure.axes, ("energy", "pointing"), strict=True):
        rows = result.summary[result.summary["measure"] == measure]
        dots = [line for line in axis.get_lines() if line.get_marker() not in ("None", None, "")]
        assert [line.get_label() for line in dots] == ["Grad-CAM", "spot in the middle", "even heat"]
        for line, column in zip(dots, ("value", "baseline", "area"), strict=True):
            np.testing.assert_allclose(line.get_xdata(), rows[column].astype(float))
        for collection, prefix in zip(axis.collections, ("", "baseline_", "area_"), strict=True):
            ends = np.array([segment[:, 0] for segment in collection.get_segments()])
            np.testing.assert_allclose(ends, rows[[f"{prefix}low", f"{prefix}high"]].astype(float))
        assert len({line.get_marker() for line in dots}) == 3
    assert [label.get_text() for label in picture.figure.axes[0].get_yticklabels()] == [
        "all images (8)",
        "A (4)",
        "B (4)",
    ]


def test_the_words_of_the_drawing_count_what_was_left_out() -> None:
    picture = draw_localisation(drawn_result([0.5, np.nan, 0.7, 0.1, 0.2, 0.3, 0.9, 0.4]))
    for words in (
        "8 test images of 4 patients",
        "of 12 test images, 9 have a mask",
        "7 x 7 places",
        "left out with an empty mask: 1",
    ):
        assert words in picture.caption
    assert "without any heat, counted as missed: 1" in picture.caption
    # Pointing: every second image, against a spot that always hits.
    assert (
        "all images, hottest place in it: Grad-CAM 50%, spot 100%, even heat 15%, Grad-CAM less spot -50 points (-50 to -50)"
        in picture.alt
    )
    assert "without any heat" not in draw_localisation(drawn_result([0.5] * 8)).caption
