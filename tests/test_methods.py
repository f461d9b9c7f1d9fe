import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from dualrefnet.models.backbones import BACKBONES
from dualrefnet.models.base import Architecture, Method
from dualrefnet.models.deepmetaforge import DeepMetadataFusion, MetadataConvolution
from dualrefnet.models.encoders import IMAGENET_MEAN, IMAGENET_STD, Encoded, Encoder, EncoderOutput, WeightsSource
from dualrefnet.models.ensemble import EfficientChannelAttention, Ensemble
from dualrefnet.models.hmfb import HyperparametricBlock
from dualrefnet.models.jif_mmfa import MutualAttention
from dualrefnet.models.metablock import MetaBlock
from dualrefnet.models.registry import METHODS, NEUTRAL
from dualrefnet.models.visual import PlaceAttention
from dualrefnet.recipe import ModelSection
from stand_in import build, given, set_linear, set_norm


def test_the_reduced_vector_stands_beside_the_form_as_it_is():
    model = build("concat", features=2, metadata_width=1, combination_factor=0.5)
    set_linear(model.reducer[0], [[1, 2]])
    set_norm(model.reducer[1], [1], sd=2)
    set_linear(model.classifier, [[1, 1], [2, 0]], [0, 1])
    # (3 + 2 - 1) / 2 = 2; the form keeps its sign.
    output = model(given([3.0, 1.0]), torch.tensor([[-7.0]]))
    torch.testing.assert_close(output.features, torch.tensor([[2.0, -7.0]]))
    torch.testing.assert_close(output.logits, torch.tensor([[-5.0, 5.0]]))
    # (-3 + 0 - 1) / 2 = -2 doesn't pass the ReLU.
    torch.testing.assert_close(model(given([-3.0, 0.0]), torch.tensor([[-7.0]])).features, torch.tensor([[0.0, -7.0]]))


def test_the_form_gates_every_channel():
    model = build("metanet", features=2, metadata_width=2)
    set_linear(model.gate[0], [[1, 0], [0, 1]], [0, 1])
    set_linear(model.classifier, [[1, 1], [1, 0]], [0, 0.5])
    output = model(given([3.0, -4.0]), torch.tensor([[0.0, 1.0]]))
    # sigmoid(0) = .5 and sigmoid(2) = .880797.
    torch.testing.assert_close(output.features, torch.tensor([[1.5, -3.523188]]))
    torch.testing.assert_close(output.logits, torch.tensor([[-2.023188, 2.0]]))


def test_in_the_reimplementation_one_gate_of_two_layers_belongs_to_64_channels():
    model = build("metanet", features=128, metadata_width=1, metanet_variant="mb_compat")
    set_linear(model.gate[0], [[1.0]] + [[0.0]] * 63)
    set_linear(model.gate[2], [[1.0] + [0.0] * 63, [-1.0] + [0.0] * 63])
    features = model(given([1.0] * 128), torch.tensor([[2.0]])).features
    torch.testing.assert_close(features, torch.tensor([[0.880797] * 64 + [0.119203] * 64]), atol=1e-6, rtol=0)
    # Below zero the ReLU between the layers holds both gates at sigmoid(0).
    torch.testing.assert_close(model(given([1.0] * 128), torch.tensor([[-2.0]])).features, torch.full((1, 128), 0.5))


def vgg(name: str, size: int = 224, **settings: object) -> Method:
    """Return a method as published for VGG-13, for two classes and three columns of metadata."""
    section = ModelSection.model_validate({"method": name, "backbone": "vgg13", "vgg_head": "flatten", **settings})
    encoder = Encoder("vgg13", nn.Identity(), WeightsSource("none", "stand-in", None, NEUTRAL, NEUTRAL))
    architecture = Architecture(image_size=size, metadata_width=3, classes=2, section=section)
    return METHODS[name].network(architecture, [encoder]).eval()


def test_vgg_is_flattened_as_in_the_public_code():
    widths = {
        "no_metadata": (25088, 2),
        "metablock": (25088, 2),
        "metanet": (25088, 2),
        # 12 = .8 * 3 / .2 beside the metadata.
        "concat": (15, 2),
    }
    for name, (features, classes) in widths.items():
        classifier = vgg(name, metanet_variant="mb_compat").classifier
        assert (classifier.in_features, classifier.out_features) == (features, classes), name
    assert [layer.in_features for layer in vgg("concat").reducer if isinstance(layer, nn.Linear)] == [25088, 1024]
    # The numbers of gates of the public code.
    assert vgg("metablock").block.scale[0].out_features == 784
    assert vgg("metanet", metanet_variant="mb_compat").gate[2].out_features == 392
    # The original gates channels, wherever they are.
    assert vgg("metanet").gate[0].out_features == 512
    # Only VGG is flattened.
    assert vgg("no_metadata", backbone="resnet50").classifier.in_features == 512


def test_every_place_of_the_map_has_a_weight_of_its_own():
    model = vgg("no_metadata", size=64)
    weight = torch.zeros(2, 512 * 4)
    # Of channel 3 the places (0, 1) and (1, 0).
    weight[0, 3 * 4 + 1], weight[1, 3 * 4 + 2] = 1.0, 10.0
    with torch.no_grad():
        model.classifier.weight.copy_(weight)
        model.classifier.bias.zero_()
    places = torch.zeros(1, 512, 2, 2)
    places[0, 3] = torch.tensor([[5.0, 7.0], [11.0, 13.0]])
    output = model(Encoded((EncoderOutput(places, places.mean(dim=(2, 3))),)), torch.zeros(1, 3))
    torch.testing.assert_close(output.logits, torch.tensor([[7.0, 110.0]]))


def test_the_block_gives_the_numbers_of_the_formula():
    block = MetaBlock(2, 2).eval()
    set_linear(block.scale[0], [[1, 0], [0, 2]], [0, 1])
    set_norm(block.scale[1], [1, 1], sd=2)
    set_linear(block.shift[0], [[0, 0], [0, 0]], [0.5, -0.5])
    set_norm(block.shift[1], [0, 0])
    # u = (3, -1): A u + b = (3, -1), and normalised t1 = (1, -1); t2 = (.5, -.5).
    out = block(torch.tensor([[[0.0, 1.0], [2.0, -0.5]]]), torch.tensor([[3.0, -1.0]]))
    # sigmoid(tanh(0) + .5), sigmoid(tanh(1) + .5); sigmoid(tanh(-2) - .5), sigmoid(tanh(.5) - .5)
    torch.testing.assert_close(out, torch.tensor([[[0.622459, 0.779299], [0.187852, 0.490530]]]), atol=2e-6, rtol=0)


def test_the_block_gives_the_numbers_of_the_formula_hmfb():
    block = HyperparametricBlock(2, 1).eval()
    set_linear(block.scale[0], [[3], [3]], [0, 0])
    set_norm(block.scale[1], [1, 1], sd=2)
    set_linear(block.shift[0], [[1], [-1]])
    set_norm(block.shift[1], [0, 0])
    # u = 1: t1 = (1, 1), t2 = (1, -1). SiLU(.7 * 2 + .3) = SiLU(1.7), SiLU(.7 * -.01 - .3) = SiLU(-.307).
    out = block(torch.tensor([[2.0, -1.0]]), torch.tensor([[1.0]]))
    torch.testing.assert_close(out, torch.tensor([[1.437410, -0.130121]]), atol=2e-6, rtol=0)


def test_mutual_attention_gives_the_numbers_of_the_formula():
    attention = MutualAttention(1)
    gates = (attention.self_image, attention.self_metadata, attention.image_by_metadata, attention.metadata_by_image)
    for gate, weight in zip(gates, (1.0, 2.0, 3.0, -0.5), strict=True):
        set_linear(gate[0], [[weight]])
    # a = 2, b = -1: s_a = sigmoid(2), m_a = sigmoid(-3), s_b = sigmoid(-2), m_b = sigmoid(-1).
    # a' = 2 + 2 * .880797 * .047426, b' = -1 - .119203 * .268941.
    out = attention(torch.tensor([[2.0]]), torch.tensor([[-1.0]]))
    torch.testing.assert_close(out, torch.tensor([[2.083545, -1.032059]]), atol=1e-6, rtol=0)


def test_in_training_the_joint_head_is_the_answer_and_each_head_has_a_loss():
    torch.manual_seed(0)
    model = build("jif_mmfa", features=4, metadata_width=3)
    arguments = given([1.0, -1.0, 2.0, 0.5]), torch.tensor([[1.0, 0.0, -1.0]])
    asked = model(*arguments)
    # Only the flag: normalisation and dropout stay as they were.
    model.training = True
    trained = model(*arguments)
    assert torch.equal(trained.logits, asked.heads["joint"])
    assert set(trained.heads) == {"image", "metadata"}


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


# Widths of the released code: of the form's network, and from the concatenation to the classifier.
VISUAL_RELEASED = {
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


def test_projecting_the_question_is_projecting_the_map():
    block, tap, vector = PlaceAttention(3, 5), torch.randn(2, 3, 4, 6), torch.randn(2, 5)
    places = functional.conv2d(tap, block.projector.weight[:, :, None, None]).flatten(2)
    attention = (places * vector.unsqueeze(2)).sum(dim=1).softmax(dim=1)
    looked, own = block(tap, vector)
    torch.testing.assert_close(own.flatten(1), attention)
    torch.testing.assert_close(looked, (places * attention.unsqueeze(1)).sum(dim=2))


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


@pytest.mark.parametrize("backbone", VISUAL_RELEASED)
def test_the_widths_are_those_of_the_released_code(backbone):
    features, (form, answer) = BACKBONES[backbone].features, VISUAL_RELEASED[backbone]
    model = build("visual", features, metadata_width=81, taps=(8, 16, features))
    assert [layer.out_features for layer in model.metadata_network if isinstance(layer, nn.Linear)] == form
    assert [layer.out_features for layer in model.reducer if isinstance(layer, nn.Linear)] == answer
    assert model.reducer[0].in_features == 4 * features
    assert model.classifier.in_features == answer[-1]
    assert [attention.projector is None for attention in model.attentions] == [False, False, True]
    assert isinstance(model.metadata_network[-1], nn.ReLU), "no dropout on the weights of the image vector"


# What three sets of weights may expect of an image: mean, deviation.
EXPECTED = [((0.5, 0.4, 0.3), (0.2, 0.3, 0.4)), (IMAGENET_MEAN, IMAGENET_STD), ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))]


class Pixels(nn.Module):
    num_features = 3

    def forward_features(self, image):
        return image


def ensemble() -> Ensemble:
    encoders = []
    for position, (mean, std) in enumerate(EXPECTED):
        encoder = Encoder("mobilenet_v2", Pixels(), WeightsSource("none", "", None, mean, std), position=position)
        encoder.features = 3
        encoders.append(encoder)
    section = ModelSection(method="ensemble", members=("mobilenet_v2",) * 3)
    return Ensemble(Architecture(image_size=32, metadata_width=5, classes=2, section=section), encoders).eval()


def test_every_encoder_gets_images_normalised_as_its_weights_expect():
    model, image = ensemble(), torch.rand(2, 3, 4, 4)
    read = []
    for encoder in model.encoders:
        encoder.register_forward_pre_hook(lambda module, inputs: read.append(inputs[0]))
    (mean, std), *_ = [[torch.tensor(values).view(3, 1, 1) for values in expected] for expected in EXPECTED]
    model((image - mean) / std, torch.zeros(2, 5))
    for seen, (mean, std) in zip(read, EXPECTED, strict=True):
        for channel in range(3):
            torch.testing.assert_close(
                seen[:, channel], (image[:, channel] - mean[channel]) / std[channel], rtol=1e-4, atol=1e-5
            )


def test_the_answer_is_the_weighted_mean_of_the_members():
    model = ensemble()
    model.decision.weights.copy_(torch.tensor([0.5, 0.5, 0.0]))
    for member, logit in zip(model.members, (0.0, 2.0, 9.0), strict=True):
        set_linear(member.classifier, [[0.0] * 256] * 2, [0.0, logit])
    output = model(Encoded(tuple(EncoderOutput(None, torch.zeros(1, 3)) for _ in range(3))), torch.zeros(1, 5))
    assert tuple(output.heads) == ("member_1", "member_2", "member_3")
    # (.5 + .880797) / 2.
    torch.testing.assert_close(output.logits.exp(), torch.tensor([[0.309602, 0.690398]]), atol=1e-6, rtol=0)
    assert output.hidden.shape == (1, 3 * 256)


def test_a_channel_is_gated_by_its_neighbours():
    attention = EfficientChannelAttention()
    with torch.no_grad():
        attention.convolution.weight.copy_(torch.tensor([[[0.0, 0.0, 1.0, 1.0, 0.0]]]))
    # Gates: sigmoid(1 + 2), sigmoid(2 - 2), sigmoid(-2 + 0).
    torch.testing.assert_close(attention(torch.tensor([[1.0, 2.0, -2.0]])), torch.tensor([[0.952574, 1.0, -0.238406]]))
