"""Super-resolution of test images: measures from their definitions, and the figures."""

import dataclasses

import cv2
import numpy as np
import pandas as pd
import pytest
import torch
from skimage.metrics import structural_similarity

from dualrefnet.analysis.opened_run import OpenedRun
from dualrefnet.analysis.reconstruction import (
    Reconstruction,
    draw_reconstruction,
    draw_reconstruction_history,
    reconstruct,
)
from dualrefnet.errors import RunError

MEASURES = ["psnr", "ssim", "psnr_flat", "ssim_flat"]


@pytest.fixture(scope="module")
def result(opened: OpenedRun) -> Reconstruction:
    return reconstruct(opened)


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    return float(10 * np.log10(1 / np.mean((one.astype(float) - other) ** 2)))


def ssim(one: np.ndarray, other: np.ndarray) -> float:
    """Wang et al. 2004 on (H, W, 3), range 0..1: Gaussian window of 11 x 11, sd 1.5, where it fits into the image."""
    look = {"data_range": 1, "channel_axis": 2, "gaussian_weights": True, "use_sample_covariance": False}
    return float(structural_similarity(one.astype(float), other.astype(float), **look))


def test_the_measures_are_those_of_the_models_pictures(opened: OpenedRun, result: Reconstruction) -> None:
    assert opened.store is not None
    ids = opened.image_examples("test").image_ids
    assert list(result.table["image_id"]) == list(ids)
    assert list(result.table.columns) == ["image_id", *MEASURES]
    assert result.images == len(ids) == len(opened.run.split.query("split == 'test'"))
    assert result.kind == "bilinear"
    mean, sd = (np.array(values, dtype=np.float32) for values in opened.normalisation)
    for row in (0, 7, len(ids) - 1):
        image = opened.store.read(opened.store.rows_of([ids[row]]))[0].astype(np.float32) / 255
        target = cv2.resize(image, (64, 64), interpolation=cv2.INTER_LINEAR)
        with torch.inference_mode():
            made = opened.model.reconstruct(torch.from_numpy(((image - mean) / sd).transpose(2, 0, 1)[None]))
        assert made is not None
        output = np.clip(made[0].permute(1, 2, 0).numpy(), 0, 1)
        flat = np.broadcast_to(target.mean(axis=(0, 1)), target.shape)
        expected = [psnr(output, target), ssim(output, target), psnr(flat, target), ssim(flat, target)]
        assert result.table.loc[row, MEASURES].tolist() == pytest.approx(expected, abs=2e-3)


def test_the_flat_yardstick_is_the_spread_of_the_targets_colours(opened: OpenedRun) -> None:
    # MSE of the mean colour is the variance within the channels: half of the pixels black, half white, is 1/4, so 6.02
    # dB.
    examples = opened.image_examples("test")
    half = np.zeros((1, 32, 32, 3), dtype=np.uint8)
    half[:, :, 16:] = 255

    class Half:
        def read(self, rows: np.ndarray) -> np.ndarray:
            return np.repeat(half, len(rows), axis=0)

    class Fixed:
        """An opened run whose images are all the same."""

        def __getattr__(self, name: str) -> object:
            return getattr(opened, name)

        def image_examples(self, side: str) -> object:
            assert side == "test"
            return dataclasses.replace(examples, store=Half())

    found = reconstruct(Fixed(), images=6).table  # type: ignore[arg-type]
    # Enlarging blurs the edge: of 64 columns four lie around it, at 1/4 and 3/4 of the way.
    columns = np.concatenate([np.zeros(31), [0.25, 0.75], np.ones(31)])
    assert found["psnr_flat"].to_numpy() == pytest.approx(-10 * np.log10(columns.var()), abs=1e-3)
    target = np.broadcast_to(columns[None, :, None], (64, 64, 3))
    assert found["ssim_flat"].to_numpy() == pytest.approx(ssim(np.full((64, 64, 3), 0.5), target), abs=1e-4)


def test_shown_are_the_images_at_a_tenth_half_and_nine_tenths_of_the_ranks(
    opened: OpenedRun, result: Reconstruction
) -> None:
    assert opened.store is not None
    ranked = result.table.sort_values("psnr", kind="stable")["image_id"].tolist()
    last = len(ranked) - 1
    assert [case.image_id for case in result.shown] == [ranked[round(part * last)] for part in (0.1, 0.5, 0.9)]
    for case in result.shown:
        row = result.table.set_index("image_id").loc[case.image_id]
        assert case.measures == pytest.approx(row.to_dict(), abs=1e-4)
        assert (case.image.shape, case.target.shape, case.reconstruction.shape) == (
            (32, 32, 3),
            (64, 64, 3),
            (64, 64, 3),
        )
        assert {case.image.dtype, case.target.dtype, case.reconstruction.dtype} == {np.dtype(np.uint8)}
        assert (case.image == opened.store.read(opened.store.rows_of([case.image_id]))[0]).all()
        # Eight bits lose little.
        assert psnr(case.reconstruction / 255, case.target / 255) == pytest.approx(row["psnr"], abs=0.05)


def test_a_run_without_a_decoder_has_nothing_to_show(opened: OpenedRun) -> None:
    recipe = opened.recipe
    without = recipe.model_copy(update={"model": recipe.model.model_copy(update={"decoder": "none"})})
    assert not without.rebuilds_image
    with pytest.raises(RunError, match="without the auxiliary task"):
        reconstruct(dataclasses.replace(opened, recipe=without))


def test_figures_show_the_images_and_the_history(opened: OpenedRun, result: Reconstruction) -> None:
    drawn = draw_reconstruction(result)
    images = [np.asarray(axis.images[0].get_array()) for axis in drawn.figure.axes]
    for row, case in enumerate(result.shown):
        for place, part in enumerate((case.image, case.target, case.reconstruction)):
            assert (images[3 * row + place] == part).all()
    # Nobody's id stands in the words.
    assert not any(image_id in drawn.alt + drawn.caption for image_id in result.table["image_id"])
    history = opened.run.history
    pd.testing.assert_frame_equal(draw_reconstruction_history(history).data, history[["epoch", "val_psnr", "val_ssim"]])
