import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dualrefnet.models.superresolution import make_target, psnr, split_native, ssim


@pytest.mark.parametrize("kind", ["bilinear", "bicubic"])
@given(value=st.floats(0, 1), height=st.integers(2, 9), width=st.integers(2, 9))
def test_an_even_image_stays_even_at_twice_the_size(kind, value, height, width):
    target = make_target(kind, torch.full((1, 3, height, width), value))
    assert target.shape == (1, 3, 2 * height, 2 * width)
    torch.testing.assert_close(target, torch.full_like(target, value), rtol=0, atol=1e-6)


@given(seed=st.integers(0, 10**6))
def test_targets_stay_in_range_although_bicubic_overshoots(seed):
    image = torch.randint(0, 2, (1, 3, 6, 6), generator=torch.Generator().manual_seed(seed)).float()
    target = make_target("bicubic", image)
    assert target.min() >= 0
    assert target.max() <= 1


def test_bilinear_has_the_known_weights_three_quarters_and_one_quarter():
    image = torch.tensor([0.0, 1.0]).reshape(1, 1, 1, 2).expand(1, 3, 2, 2)
    target = make_target("bilinear", image)
    torch.testing.assert_close(target[0, 0, 0], torch.tensor([0.0, 0.25, 0.75, 1.0]))


def test_the_two_interpolations_differ():
    image = torch.rand(1, 3, 8, 8)
    assert not torch.allclose(make_target("bilinear", image), make_target("bicubic", image))


def test_native_is_no_interpolation():
    with pytest.raises(ValueError, match="split_native"):
        make_target("native", torch.zeros(1, 3, 4, 4))


def test_native_input_is_the_mean_of_two_by_two_and_the_target_is_the_photograph():
    photograph = torch.rand(2, 3, 6, 10)
    image, target = split_native(photograph)
    assert image.shape == (2, 3, 3, 5)
    torch.testing.assert_close(image[1, 2, 1, 4], photograph[1, 2, 2:4, 8:10].mean())
    assert torch.equal(target, photograph)


def test_a_photograph_of_odd_size_is_refused():
    with pytest.raises(ValueError, match="5x8"):
        split_native(torch.zeros(1, 3, 5, 8))


@given(error=st.floats(0.001, 1))
def test_psnr_of_an_even_error_is_minus_twenty_log_of_it(error):
    target = torch.zeros(2, 3, 4, 4)
    prediction = target.clone()
    prediction[1] = error
    values = psnr(prediction, target)
    assert values[0] == math.inf
    assert values[1].item() == pytest.approx(-20 * math.log10(error), abs=1e-3)


def test_psnr_of_half_precision_images_is_computed_in_single_precision():
    target = torch.full((1, 3, 4, 4), 0.5, dtype=torch.bfloat16)
    prediction = target + torch.tensor(2.0**-8, dtype=torch.bfloat16)
    assert psnr(prediction, target).dtype == torch.float32
    assert psnr(prediction, target).item() == pytest.approx(160 * math.log10(2), abs=1e-3)


def test_psnr_of_different_shapes_is_refused():
    with pytest.raises(ValueError, match="one shape"):
        psnr(torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 8, 8))


def test_ssim_of_flat_images_is_the_luminance_term() -> None:
    # Without any structure only (2 a b + C1) / (a² + b² + C1) is left, C1 = .01².
    a, b = torch.full((2, 3, 16, 16), 0.2), torch.full((2, 3, 16, 16), 0.6)
    assert ssim(a, b).tolist() == pytest.approx([(2 * 0.2 * 0.6 + 1e-4) / (0.04 + 0.36 + 1e-4)] * 2, rel=1e-5)
    assert ssim(a, a).tolist() == [1, 1]
    with pytest.raises(ValueError, match="one shape"):
        ssim(a, b[:, :, :8])
