import pytest
import torch
import torch.nn.functional as F

from dualrefnet.models.components import create_decoder
from dualrefnet.models.encoders import create_encoder

KINDS = ("plain", "bottleneck")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("stride", "side"), [(32, 7), (16, 14)])
def test_a_map_of_a_224_pixel_image_becomes_an_image_of_448(kind, stride, side):
    decoder = create_decoder(kind, 40, stride)
    assert decoder(torch.randn(2, 40, side, side)).shape == (2, 3, 448, 448)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stride", [16, 32])
def test_oblong_maps_stay_oblong(kind, stride):
    assert create_decoder(kind, 8, stride)(torch.randn(2, 8, 2, 3)).shape == (2, 3, 4 * stride, 6 * stride)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stride", [16, 32])
def test_a_decoder_has_six_convolutions_each_with_a_gradient(kind, stride):
    decoder = create_decoder(kind, 24, stride)
    convolutions = [
        layer for layer in decoder.modules() if isinstance(layer, torch.nn.Conv2d | torch.nn.ConvTranspose2d)
    ]
    assert len(convolutions) == 6
    decoder(torch.randn(2, 24, 2, 2)).square().mean().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in decoder.parameters())


def test_mobilenet_and_decoder_make_448_of_224():
    encoder = create_encoder("mobilenet_v2", weights="none").eval()
    decoder = create_decoder("bottleneck", encoder.features, encoder.stride).eval()
    with torch.no_grad():
        assert decoder(encoder(torch.randn(1, 3, 224, 224)).map).shape == (1, 3, 448, 448)


@pytest.mark.parametrize("kind", KINDS)
def test_an_untrained_decoder_draws_an_almost_even_grey_image(kind):
    torch.manual_seed(0)
    image = create_decoder(kind, 64, 32)(torch.randn(4, 64, 3, 3))
    assert image.mean().item() == pytest.approx(0.5, abs=0.1)
    assert image.std().item() < 0.2


def test_an_untrained_bottleneck_draws_no_checkerboard():
    torch.manual_seed(0)
    image = create_decoder("bottleneck", 64, 32)(torch.randn(2, 64, 2, 2))
    tiles = image.reshape(2, 3, 16, 8, 16, 8)
    torch.testing.assert_close(tiles, tiles[:, :, :, :1, :, :1].expand_as(tiles))


@pytest.mark.parametrize("kind", KINDS)
def test_a_decoder_learns_to_draw_what_the_map_says(kind):
    torch.manual_seed(0)
    maps = torch.randn(4, 32, 2, 2)
    target = F.interpolate(torch.rand(4, 3, 4, 4), size=(128, 128), mode="bicubic").clamp(0, 1)
    decoder = create_decoder(kind, 32, 32)
    optimizer = torch.optim.Adam(decoder.parameters(), lr=3e-3)
    errors = []
    for _ in range(45):
        optimizer.zero_grad()
        error = F.mse_loss(decoder(maps), target)
        error.backward()
        optimizer.step()
        errors.append(error.item())
    assert errors[-1] < errors[0] / 4


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_last_shuffle_is_a_pixel_shuffle_into_planes(layout):
    features = torch.randn(2, 192, 3, 5).to(memory_format=layout)
    image = create_decoder("bottleneck", 8, 32)[-1](features)
    torch.testing.assert_close(image, F.pixel_shuffle(features, 8))
    assert image.is_contiguous()


def test_other_kinds_and_strides_are_refused():
    with pytest.raises(ValueError, match="plain, bottleneck"):
        create_decoder("deep", 8, 32)
    with pytest.raises(ValueError, match="stride 16 or 32, not 8"):
        create_decoder("plain", 8, 8)
