import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dualrefnet.models.components import (
    ATTENTION_WIDTH,
    DECODERS,
    FUSIONS,
    ColumnAttention,
    DecisionFusion,
    MetadataTransformer,
    metadata_mlp,
)
from dualrefnet.models.encoders import EncoderOutput
from stand_in import set_linear


def test_the_metadata_network_has_four_layers_and_no_last_relu():
    network = metadata_mlp(73, (64, 128, 256, 512))
    assert [layer.out_features for layer in network if isinstance(layer, nn.Linear)] == [64, 128, 256, 512]
    assert [type(layer) for layer in network] == [nn.Linear, nn.ReLU] * 3 + [nn.Linear]
    assert (network(torch.randn(64, 73)) < 0).any()


def test_column_attention_gives_the_numbers_of_the_formula():
    attention = ColumnAttention(2)
    set_linear(attention.weights[0], [[1, 0], [0, 1]])
    set_linear(attention.weights[2], [[1, 0], [1, 3]], [0, 1])
    # relu(2, -1) = (2, 0); sigmoid(2) = .880797 and sigmoid(2 + 1) = .952574, so the second column's weight is the
    # first's doing.
    torch.testing.assert_close(attention(torch.tensor([[2.0, -1.0]])), torch.tensor([[1.761594, -0.952574]]))


def test_a_token_is_its_columns_value_in_its_direction_at_its_place():
    network = MetadataTransformer(2, 3).eval()
    with torch.no_grad():
        network.directions.copy_(torch.stack([torch.full((64,), 1.0), torch.full((64,), 10.0)]))
        network.places.copy_(torch.stack([torch.full((64,), 0.25), torch.full((64,), 0.5)]))
        network.gatherer.fill_(7.0)
    seen = []
    network.layers.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    network(torch.tensor([[2.0, -1.0]]))
    assert seen[0].shape == (1, 3, 64)
    torch.testing.assert_close(seen[0][0, :, 5], torch.tensor([7.0, 2.25, -9.5]))


def test_hadamard_multiplies_the_projected_image():
    fusion = FUSIONS["hadamard"](3, 2)
    assert fusion.features == 2
    set_linear(fusion.projection, [[1, 0, 1], [0, 2, 0]], [0, 1])
    # (1 + 3, 2 * 2 + 1) times (10, -1).
    fused = fusion(EncoderOutput(None, torch.tensor([[1.0, 2.0, 3.0]])), torch.tensor([[10.0, -1.0]]))
    torch.testing.assert_close(fused, torch.tensor([[40.0, -5.0]]))


def test_cross_attention_without_preference_is_the_mean_of_vector_and_places():
    fusion = FUSIONS["cross_attention"](1, 1)
    assert fusion.features == 1024
    set_linear(fusion.places, [[1.0]] * ATTENTION_WIDTH)
    set_linear(fusion.question, [[2.0]] * ATTENTION_WIDTH)
    identity = torch.eye(ATTENTION_WIDTH)
    with torch.no_grad():
        # No question: all scores are zero. Values and answer pass as they are.
        fusion.attention.in_proj_weight.copy_(torch.cat([0 * identity, identity, identity]))
        fusion.attention.in_proj_bias.zero_()
        fusion.attention.out_proj.weight.copy_(identity)
        fusion.attention.out_proj.bias.zero_()
    encoded = EncoderOutput(torch.tensor([[[[0.0, 1.0], [2.0, 3.0]]]]), torch.tensor([[4.0]]))
    fused = fusion(encoded, torch.tensor([[5.0]]))
    torch.testing.assert_close(fused, torch.tensor([[2.0] * ATTENTION_WIDTH + [10.0] * ATTENTION_WIDTH]))


def logits_of(probabilities: list[list[list[float]]]) -> torch.Tensor:
    return torch.tensor(probabilities).log()


def test_the_answer_is_the_weighted_mean_of_the_probabilities():
    fusion = DecisionFusion(("a", "b"))
    fusion.weights.copy_(torch.tensor([0.75, 0.25]))
    # Logits are known up to a constant: softmax(ln p + 3) = p.
    logits = logits_of([[[0.2, 0.8]], [[0.6, 0.4]]]) + torch.tensor([3.0, -5.0])[:, None, None]
    torch.testing.assert_close(fusion(logits), torch.tensor([[math.log(0.3), math.log(0.7)]]))


def test_the_choice_is_by_balanced_accuracy_and_absent_classes_dont_count():
    labels = torch.tensor([0] * 8 + [1] * 2)
    # The first head takes two of the eight for class 2, of which there is none: recalls 6/8 and 1, balanced 7/8, 8 of
    # 10 right.
    # The second misses one of the two: recalls 1 and 1/2, balanced 3/4, but 9 of 10 right.
    balanced = [2, 2, 0, 0, 0, 0, 0, 0, 1, 1]
    accurate = [0, 0, 0, 0, 0, 0, 0, 0, 1, 0]
    # Where they differ, the mean follows the heavier one, and of equals the first, which is a little surer.
    logits = torch.stack([certainty * torch.eye(3)[heads] for heads, certainty in ((balanced, 4.0), (accurate, 3.9))])
    fusion = DecisionFusion(("balanced", "accurate"))
    fusion.choose(logits, labels)
    assert fusion(logits).argmax(dim=1).tolist() == balanced
    torch.testing.assert_close(fusion.weights, torch.tensor([0.5, 0.5]))


KINDS = ("plain", "bottleneck")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stride", [16, 32])
def test_a_decoder_has_six_convolutions_each_with_a_gradient(kind, stride):
    decoder = DECODERS[kind](24, stride)
    convolutions = [
        layer for layer in decoder.modules() if isinstance(layer, torch.nn.Conv2d | torch.nn.ConvTranspose2d)
    ]
    assert len(convolutions) == 6
    decoder(torch.randn(2, 24, 2, 2)).square().mean().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in decoder.parameters())


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_last_shuffle_is_a_pixel_shuffle_into_planes(layout):
    features = torch.randn(2, 192, 3, 5).to(memory_format=layout)
    image = DECODERS["bottleneck"](8, 32)[-1](features)
    torch.testing.assert_close(image, F.pixel_shuffle(features, 8))
    assert image.is_contiguous()
