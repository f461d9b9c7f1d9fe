import pytest
import torch
from torch import nn

from dualrefnet.models.encoders import BACKBONES
from dualrefnet.models.hmfb import HyperparametricBlock
from stand_in import build, given, set_linear, set_norm

# The released code's, of the encoders that it has.
RELEASED = {
    "vgg13": [256, 128, 64],
    "resnet50": [1024, 512, 256],
    "densenet121": [512, 256, 128],
    "mobilenet_v2": [512, 256, 64],
    "efficientnet_b4": [1024, 512, 256],
}


def test_the_block_gives_the_numbers_of_the_formula():
    block = HyperparametricBlock(2, 1).eval()
    set_linear(block.scale[0], [[3], [3]], [0, 0])
    set_norm(block.scale[1], [1, 1], sd=2)
    set_linear(block.shift[0], [[1], [-1]])
    set_norm(block.shift[1], [0, 0])
    # u = 1: t1 = (1, 1), t2 = (1, -1). SiLU(.7 * 2 + .3) = SiLU(1.7), SiLU(.7 * -.01 - .3) = SiLU(-.307).
    out = block(torch.tensor([[2.0, -1.0]]), torch.tensor([[1.0]]))
    torch.testing.assert_close(out, torch.tensor([[1.437410, -0.130121]]), atol=2e-6, rtol=0)


@pytest.mark.parametrize(("backbone", "widths"), RELEASED.items())
def test_the_funnels_are_those_of_the_released_code(backbone, widths):
    model = build("hmfb", BACKBONES[backbone].features, metadata_width=73)
    assert [layer.out_features for layer in model.funnel if isinstance(layer, nn.Linear)] == widths
    assert [layer.p for layer in model.funnel if isinstance(layer, nn.Dropout)] == [0.4, 0.4, 0.3]
    assert model.classifier.in_features == widths[-1]


def test_the_block_comes_before_the_funnel():
    model = build("hmfb", features=8, metadata_width=1)
    form = torch.tensor([[0.5]])
    vector = [float(number) for number in range(8)]
    torch.testing.assert_close(
        model(given(vector), form).logits, model.classifier(model.funnel(model.block(torch.tensor([vector]), form)))
    )
