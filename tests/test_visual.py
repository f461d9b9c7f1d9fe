import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from dualrefnet.models.encoders import BACKBONES
from dualrefnet.models.visual import PlaceAttention
from stand_in import build, given, set_linear, set_norm

# Widths of the released code: of the form's network, and from the concatenation to the classifier.
RELEASED = {
    "vgg13": ([256, 512], [512, 256]),
    "densenet121": ([256, 512, 1024], [1024, 512, 256]),
    "resnet50": ([512, 2048], [2048, 512]),
    "mobilenet_v2": ([512, 1280], [1280, 512]),
    "efficientnet_b4": ([512, 1792], [1792, 512]),
}


def test_attention_on_two_by_two_places_by_hand():
    # <L(x), g> is the first channel: ln 1, ln 2, ln 3, ln 4, so the softmax is 1/10, 2/10, 3/10, 4/10.
    first = [[0.0, math.log(2)], [math.log(3), math.log(4)]]
    tap = torch.tensor([[first, [[1.0, 2.0], [3.0, 4.0]]]])
    looked, attention = PlaceAttention(2, 2)(tap, torch.tensor([[1.0, 0.0]]))
    torch.testing.assert_close(attention, torch.tensor([[[0.1, 0.2], [0.3, 0.4]]]))
    # .2 ln 2 + .3 ln 3 + .4 ln 4, and .1 + .4 + .9 + 1.6.
    torch.testing.assert_close(looked, torch.tensor([[1.022731, 3.0]]))


def test_a_tap_of_other_channels_is_projected_first():
    block = PlaceAttention(1, 2)
    set_linear(block.projector, [[1], [2]])
    # L = (T, 2 T) and g = (1, 1): the score is 3 T.
    tap = torch.tensor([[[[0.0, math.log(2) / 3], [math.log(3) / 3, math.log(4) / 3]]]])
    looked, attention = block(tap, torch.tensor([[1.0, 1.0]]))
    torch.testing.assert_close(attention, torch.tensor([[[0.1, 0.2], [0.3, 0.4]]]))
    torch.testing.assert_close(looked, torch.tensor([[0.340910, 0.681821]]))


def test_projecting_the_question_is_projecting_the_map():
    block, tap, vector = PlaceAttention(3, 5), torch.randn(2, 3, 4, 6), torch.randn(2, 5)
    places = functional.conv2d(tap, block.projector.weight[:, :, None, None]).flatten(2)
    attention = (places * vector.unsqueeze(2)).sum(dim=1).softmax(dim=1)
    looked, own = block(tap, vector)
    torch.testing.assert_close(own.flatten(1), attention)
    torch.testing.assert_close(looked, (places * attention.unsqueeze(1)).sum(dim=2))


@pytest.mark.parametrize("channels", [3, 8])
def test_half_precision_doesnt_reach_the_softmax(channels):
    torch.manual_seed(0)
    block, tap, vector = PlaceAttention(channels, 8), 9 * torch.randn(2, channels, 4, 4), 9 * torch.randn(2, 8)
    with torch.autocast("cpu", torch.bfloat16):
        looked, attention = block(tap, vector)
    torch.testing.assert_close((looked, attention), block(tap, vector), rtol=0, atol=0)


def test_the_form_weights_the_image_vector_and_stands_last():
    model = build("visual", features=2, metadata_width=1, taps=(2, 2, 2))
    set_linear(model.metadata_network[0], [[1], [-1]])
    set_norm(model.metadata_network[1], [0, 0], sd=2)
    fused = []
    model.reducer.register_forward_pre_hook(lambda module, inputs: fused.append(inputs[0]))
    # Maps without structure: attention is even, and gives their mean.
    taps = [torch.tensor([[[[number]], [[-number]]]]).expand(1, 2, 3, 3) for number in (1.0, 2.0, 3.0)]
    model(given([5.0, 7.0], taps), torch.tensor([[4.0]]))
    # phi = relu(4 / 2), relu(-4 / 2).
    torch.testing.assert_close(fused[0], torch.tensor([[1.0, -1.0, 2.0, -2.0, 3.0, -3.0, 10.0, 0.0]]))


@pytest.mark.parametrize("backbone", RELEASED)
def test_the_widths_are_those_of_the_released_code(backbone):
    features, (form, answer) = BACKBONES[backbone].features, RELEASED[backbone]
    model = build("visual", features, metadata_width=81, taps=(8, 16, features))
    assert [layer.out_features for layer in model.metadata_network if isinstance(layer, nn.Linear)] == form
    assert [layer.out_features for layer in model.reducer if isinstance(layer, nn.Linear)] == answer
    assert model.reducer[0].in_features == 4 * features
    assert model.classifier.in_features == answer[-1]
    assert [attention.projector is None for attention in model.attentions] == [False, False, True]
    assert isinstance(model.metadata_network[-1], nn.ReLU), "no dropout on the weights of the image vector"
