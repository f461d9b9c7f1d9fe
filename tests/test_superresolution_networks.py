import os
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from dualrefnet.data.images import decode_image
from dualrefnet.errors import WeightsError
from dualrefnet.files import sha256_of_file
from dualrefnet.models import superresolution_networks as networks
from dualrefnet.models.encoders import WEIGHTS_VARIABLE
from dualrefnet.models.superresolution import make_target, psnr, split_native
from dualrefnet.models.superresolution_networks import NETWORKS, enlarge, find_network_file, load_network

REAL_FOLDER = os.environ.get(WEIGHTS_VARIABLE)

every_network = pytest.mark.parametrize("name", NETWORKS)


@pytest.fixture(autouse=True)
def alone(monkeypatch, tmp_path):
    """No folder of weights, an empty cache, and whoever asks the network fails, whatever this machine has."""
    monkeypatch.delenv(WEIGHTS_VARIABLE, raising=False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(networks.requests, "get", lambda *arguments, **options: pytest.fail("the network was asked"))


@pytest.fixture
def carn_m(monkeypatch):
    if REAL_FOLDER is None or not (Path(REAL_FOLDER) / "carn_m.pth").is_file():
        pytest.skip(f"{WEIGHTS_VARIABLE} doesn't hold carn_m.pth")
    monkeypatch.setenv(WEIGHTS_VARIABLE, REAL_FOLDER)
    return load_network("carn_m")


def random_state(name, seed=0):
    torch.manual_seed(seed)
    return NETWORKS[name].build().state_dict()


def same_as(network, state):
    own = network.state_dict()
    return own.keys() == state.keys() and all(torch.equal(own[key], state[key]) for key in own)


def emptied(network):
    """Zero every convolution but those that add or subtract the mean."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d) and module.weight.shape != (3, 3, 1, 1):
            for parameter in module.parameters():
                nn.init.zeros_(parameter)
    return network


def copy_channels(convolution, times=1, channels=3):
    """Let channel c of the input become the channels c * times + k of the output, k < times, pixel by pixel."""
    with torch.no_grad():
        for channel in range(channels):
            convolution.weight[channel * times : (channel + 1) * times, channel, 1, 1] = 1


def twice(image):
    return image.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)


class Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, image):
        return self.function(image)


# Architecture


@pytest.mark.parametrize(
    ("name", "count"),
    [
        # head 3*16*9; a block 16*32*9+32, attention 32*8+8 and 8*32+32, 32*16*9; tail 16*12*9+12; the mean twice
        ("ninasr_b0", 432 + 10 * (4640 + 264 + 288 + 4608) + 1740 + 6),
        ("ninasr_b1", 864 + 26 * (18496 + 1040 + 1088 + 18432) + 3468 + 6),
        # head; 16 blocks of two convolutions and one more; 64 to 256; tail; the mean twice as a convolution
        ("edsr", 1792 + 33 * 36928 + 147712 + 1731 + 24),
        # entry; 3 blocks (two convolutions in 4 groups and one of 1x1, fusions of 2, 3 and 4 maps); fusions; x2, x3,
        # x4; exit; mean
        ("carn_m", 1792 + 3 * (2 * 9280 + 4160 + 37056) + 37056 + 37120 + 83520 + 2 * 37120 + 1731 + 24),
    ],
)
def test_parameters_are_as_many_as_counted_by_hand_and_as_published(name, count):
    assert sum(parameter.numel() for parameter in NETWORKS[name].build().parameters()) == count
    assert round(count / 1e6, 2) == NETWORKS[name].parameters


@pytest.mark.parametrize(
    ("name", "blocks", "keys"),
    [
        (
            "ninasr_b0",
            ("body.9.",),
            "head.0.bias head.1.weight body.9.body.0.weight body.9.body.0.bias body.9.body.2.body.1.weight body.9.body.2.body.1.bias "
            "body.9.body.2.body.3.weight body.9.body.2.body.3.bias body.9.body.3.weight tail.0.weight tail.0.bias tail.2.bias",
        ),
        (
            "edsr",
            ("body.15.", "body.16."),
            "sub_mean.weight sub_mean.bias add_mean.weight add_mean.bias head.0.weight head.0.bias body.15.body.0.weight "
            "body.15.body.0.bias body.15.body.2.weight body.15.body.2.bias body.16.weight body.16.bias tail.0.0.weight tail.0.0.bias "
            "tail.1.weight tail.1.bias",
        ),
    ],
)
def test_parameters_have_the_published_names(name, blocks, keys):
    own = NETWORKS[name].build().state_dict()
    assert sorted(key for key in own if not key.startswith("body.") or key.startswith(blocks)) == sorted(keys.split())


@every_network
@pytest.mark.parametrize(("height", "width"), [(7, 18), (33, 16)])
def test_an_image_of_any_size_is_doubled(name, height, width):
    with torch.no_grad():
        output = NETWORKS[name].build()(torch.rand(2, 3, height, width))
    assert output.shape == (2, 3, 2 * height, 2 * width)
    assert torch.isfinite(output).all()


def test_a_block_of_ninasr_scales_before_and_after():
    block = emptied(networks._NinaBlock(2, in_scale=0.5, out_scale=0.4))
    with torch.no_grad():
        block.body[0].weight[3, 0, 1, 1] = 1.0
        block.body[3].weight[1, 3, 1, 1] = 10.0
        features = torch.tensor([[[[2.0]], [[7.0]]]])
        # 7 + 2 * 0.4 * 10 * (0.5 * 2) * sigmoid(0)
        torch.testing.assert_close(block(features), torch.tensor([[[[2.0]], [[11.0]]]]))
        torch.testing.assert_close(block(-features), -features, msg="ReLU leaves nothing of a negative number")


@pytest.mark.parametrize(("height", "width"), [(20, 37), (16, 5), (33, 32)])
def test_local_attention_weighs_tiles_by_the_mean_about_their_first_pixel(height, width):
    torch.manual_seed(3)
    attention = networks._LocalAttention(4)
    features = torch.randn(1, 4, height, width)
    (squeeze, excite) = (attention.body[1], attention.body[3])
    expected = torch.empty_like(features)
    for top in range(0, height, 16):
        for left in range(0, width, 16):
            window = features[0, :, max(top - 15, 0) : top + 16, max(left - 15, 0) : left + 16].mean(dim=(1, 2))
            hidden = (squeeze.weight[:, :, 0, 0] @ window + squeeze.bias).clamp(min=0)
            gate = 1 / (1 + torch.exp(-(excite.weight[:, :, 0, 0] @ hidden + excite.bias)))
            tile = (0, slice(None), slice(top, top + 16), slice(left, left + 16))
            expected[tile] = features[tile] * gate[:, None, None]
    torch.testing.assert_close(attention(features), expected)


def test_carn_m_whose_cascades_pass_their_input_on_passes_the_image_on():
    network = emptied(NETWORKS["carn_m"].build())
    fusions = [
        module for owner in (network, network.b1, network.b2, network.b3) for module in (owner.c1, owner.c2, owner.c3)
    ]
    with torch.no_grad():
        # ReLU would cut what lies below the mean, so one is added at the entry and taken away at the exit.
        network.entry.bias.fill_(1)
        network.exit.bias.fill_(-1)
        for fusion in fusions:
            fusion.body[0].weight[:, :64, 0, 0] = torch.eye(64)
        copy_channels(network.entry)
        copy_channels(network.exit)
        copy_channels(network.upsample["up2"].body[0], times=4)
        image = torch.rand(1, 3, 4, 5)
        torch.testing.assert_close(network(image), twice(image))


@pytest.mark.parametrize("slot", [0, 1, 2, 3])
def test_a_cascade_fuses_its_input_and_every_output_in_order(slot):
    block = emptied(networks._CascadingBlock(8, groups=2))
    with torch.no_grad():
        # The residual block adds 1; the first two fusions pass on its newest output.
        block.b1.body[4].bias.fill_(1)
        for number, fusion in ((1, block.c1), (2, block.c2), (slot, block.c3)):
            fusion.body[0].weight[:, 8 * number : 8 * (number + 1), 0, 0] = torch.eye(8)
        features = torch.rand(1, 8, 3, 3)
        torch.testing.assert_close(block(features), features + slot)


# Weights


@every_network
def test_a_file_in_the_folder_is_loaded_strictly_and_frozen(name, monkeypatch, tmp_path):
    state = random_state(name, seed=5)
    path = tmp_path / f"{name}.safetensors"
    save_file(state, path)
    monkeypatch.setenv(WEIGHTS_VARIABLE, str(tmp_path))
    network, source = load_network(name)
    assert same_as(network, state)
    assert not network.training
    assert not any(parameter.requires_grad for parameter in network.parameters())
    assert (source.kind, source.description, source.sha256) == ("file", path.name, sha256_of_file(path))
    assert find_network_file(name) == path


def test_loading_does_not_change_what_is_drawn_next(tmp_path):
    path = tmp_path / "mine.pth"
    torch.save(random_state("ninasr_b0"), path)
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    load_network("ninasr_b0", str(path))
    assert torch.equal(torch.rand(3), expected)


# Downloads


class Answer:
    def __init__(self, content, status=200):
        self.content, self.status = content, status

    def raise_for_status(self):
        if self.status != 200:
            raise networks.requests.HTTPError(f"{self.status}")


def serve(monkeypatch, answer, asked=None):
    def get(url, timeout):
        if asked is not None:
            asked.append((url, timeout))
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(networks.requests, "get", get)


def test_a_download_is_kept_and_not_fetched_again(monkeypatch, tmp_path):
    state = random_state("ninasr_b0", seed=5)
    torch.save(state, tmp_path / "server.pt")
    asked = []
    serve(monkeypatch, Answer((tmp_path / "server.pt").read_bytes()), asked)
    assert find_network_file("ninasr_b0") is None
    sources = []
    for _ in range(2):
        network, source = load_network("ninasr_b0")
        assert same_as(network, state)
        sources.append(source)
    assert len(asked) == 1
    assert asked[0][0] == NETWORKS["ninasr_b0"].url
    assert all(seconds <= 10 for seconds in asked[0][1])
    assert sources[0] == sources[1]
    assert (sources[0].kind, sources[0].description) == ("hub", NETWORKS["ninasr_b0"].url)
    assert [path.name for path in (tmp_path / "torch" / "hub" / "checkpoints").iterdir()] == ["ninasr_b0_x2.pt"]


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (networks.requests.ConnectionError("no route"), r"out of reach \(ConnectionError\)"),
        (networks.requests.Timeout("slow"), r"out of reach \(Timeout\)"),
        (Answer(b"", status=404), r"out of reach \(HTTPError\)"),
        (Answer(b"<html>please log in</html>"), "sends something else than the published file"),
    ],
)
def test_a_failed_download_says_what_was_tried_and_leaves_nothing(monkeypatch, tmp_path, answer, reason):
    serve(monkeypatch, answer)
    monkeypatch.setenv(WEIGHTS_VARIABLE, str(tmp_path))
    with pytest.raises(
        WeightsError, match=rf"no weights for edsr: no file for it in {tmp_path}; not in the cache.*{reason}"
    ) as caught:
        load_network("edsr")
    assert f"Put edsr64_x2.pt from https://github.com/Coloquinte/torchSR into {tmp_path}" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_download_that_fits_but_is_not_the_published_file_is_refused(monkeypatch, tmp_path):
    torch.save(random_state("carn_m"), tmp_path / "server.pth")
    serve(monkeypatch, Answer((tmp_path / "server.pth").read_bytes()))
    with pytest.raises(WeightsError, match=f"{WEIGHTS_VARIABLE} isn't set.*sends something else"):
        load_network("carn_m")
    assert find_network_file("carn_m") is None


# Enlarging


def test_enlarge_gives_the_bytes_back_in_order():
    images = np.random.default_rng(0).integers(0, 256, (5, 4, 6, 3), dtype=np.uint8)

    def network(image):
        assert torch.is_inference(image)
        assert image.min() >= 0
        assert image.max() <= 1
        return twice(image)

    images.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        enlarged = enlarge(Function(network), images)
    np.testing.assert_array_equal(enlarged, images.repeat(2, axis=1).repeat(2, axis=2))


# The published CARN-M


def test_carn_m_restores_real_photographs_better_than_bicubic(carn_m, real_pad):
    gains = []
    for path in sorted((real_pad / "originals").glob("*.png")):
        picture = decode_image(path)
        top, left = ((side - 192) // 2 for side in picture.shape[:2])
        original = torch.tensor(picture[top : top + 192, left : left + 192]).permute(2, 0, 1)[None] / 255
        image = (split_native(original)[0] * 255).round().to(torch.uint8)
        restored = torch.tensor(enlarge(carn_m[0], image.permute(0, 2, 3, 1).numpy())).permute(0, 3, 1, 2) / 255
        bicubic = (make_target("bicubic", image / 255) * 255).round() / 255
        gains.append((psnr(restored, original) - psnr(bicubic, original)).item())
    assert len(gains) == 24
    # 0.35 dB, and 20 of the photographs, when this was written: the network was trained on images shrunk otherwise.
    assert np.mean(gains) > 0.25
    assert np.sum(np.array(gains) > 0) >= 18
