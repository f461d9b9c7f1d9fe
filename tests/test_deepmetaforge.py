import torch
from torch import nn

from dualrefnet.models.deepmetaforge import DeepMetadataFusion, MetadataConvolution
from stand_in import build, given, set_linear, set_norm


def fusion_by_hand() -> DeepMetadataFusion:
    fusion = DeepMetadataFusion(4).eval()
    # Only the first of the 256 numbers carries anything: v1 + m1.
    set_linear(fusion.compress[0], [[1.0, 0.0, 1.0, 0.0]] + [[0.0] * 4] * 255)
    set_norm(fusion.compress[1], [0.0] * 256)
    set_linear(fusion.decompress[0], [[scale] + [0.0] * 255 for scale in (1.0, 0.0, -1.0, 2.0)])
    return fusion


def test_the_module_gives_the_numbers_of_the_formula():
    # v = (3, 1), m = (-1, 2): c = GELU(2) = 1.954500; gates sigmoid(c (1, 0, -1, 2)) = .875936, .5, .124064, .980334;
    # [v * a_v + v || m * a_m + m] = 5.627809, 1.5, -1.124064, 3.960668: mean 2.491103, sd 2.551975.
    out = fusion_by_hand()(torch.tensor([[3.0, 1.0]]), torch.tensor([[-1.0, 2.0]]))
    torch.testing.assert_close(out, torch.tensor([[1.229129, -0.388367, -1.416615, 0.575854]]), atol=1e-5, rtol=0)


def test_the_form_opens_the_gates_of_the_image():
    fusion = fusion_by_hand()
    seen = []
    fusion.norm.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    for first in (-1.0, 1.0):
        fusion(torch.tensor([[3.0, 1.0]]), torch.tensor([[first, 2.0]]))
    # sigmoid(GELU(2)) and sigmoid(GELU(4)) of 3, and 3 itself.
    torch.testing.assert_close(
        torch.stack([values[0, 0] for values in seen]), torch.tensor([5.627809, 5.946035]), atol=1e-5, rtol=0
    )


def test_the_form_is_convolved_with_zeros_at_its_ends():
    network = MetadataConvolution(metadata_width=3, features=3)
    with torch.no_grad():
        for layer in (network.convolutions[0], network.convolutions[2], network.last):
            layer.weight.zero_()
            layer.bias.zero_()
        network.convolutions[0].weight[0, 0] = torch.tensor([1.0, 2.0, 3.0])
        network.convolutions[2].weight[0, 0, 1] = 1.0
        network.last.weight[:, :3] = torch.eye(3)
    # (2 + 6, 1 + 4 + 9, 2 + 6); below zero nothing passes.
    torch.testing.assert_close(network(torch.tensor([[1.0, 2.0, 3.0]])), torch.tensor([[8.0, 14.0, 8.0]]))
    torch.testing.assert_close(network(torch.tensor([[-1.0, -2.0, -3.0]])), torch.zeros(1, 3))


def test_image_and_form_are_equally_long_and_go_through_512_to_the_classes():
    model = build("deepmetaforge", features=6, metadata_width=5)
    assert model(given([1.0] * 6), torch.zeros(1, 5)).features.shape == (1, 12)
    set_linear(model.hidden, [[0.0] * 12] * 512, [2.0] + [0.0] * 511)
    set_linear(model.classifier, [[1.0] + [0.0] * 511, [0.0] * 512])
    # GELU(2) and nothing else.
    torch.testing.assert_close(model(given([1.0] * 6), torch.zeros(1, 5)).logits, torch.tensor([[1.954500, 0.0]]))
    assert [layer.p for layer in model.modules() if isinstance(layer, nn.Dropout)] == [0.2]
