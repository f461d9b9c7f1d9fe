import torch
from torch import nn

from dualrefnet.models.base import Architecture
from dualrefnet.models.encoders import IMAGENET_MEAN, IMAGENET_STD, Encoded, Encoder, EncoderOutput, WeightsSource
from dualrefnet.models.ensemble import EfficientChannelAttention, Ensemble, Member
from dualrefnet.recipe import ModelSection
from stand_in import set_linear

# What three sets of weights may expect of an image: mean, deviation.
EXPECTED = [((0.5, 0.4, 0.3), (0.2, 0.3, 0.4)), (IMAGENET_MEAN, IMAGENET_STD), ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))]


class Pixels(nn.Module):
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
    assert output.features.shape == (1, 3 * 256)


def test_members_read_their_own_encoder():
    torch.manual_seed(0)
    model, vectors = ensemble(), [torch.randn(1, 3) for _ in range(3)]
    form = torch.ones(1, 5)
    heads = model(Encoded(tuple(EncoderOutput(None, vector) for vector in vectors)), form).heads
    vectors[1] = -vectors[1]
    others = model(Encoded(tuple(EncoderOutput(None, vector) for vector in vectors)), form).heads
    assert [name for name in heads if not torch.equal(heads[name], others[name])] == ["member_2"]


def test_a_channel_is_gated_by_its_neighbours():
    attention = EfficientChannelAttention()
    with torch.no_grad():
        attention.convolution.weight.copy_(torch.tensor([[[0.0, 0.0, 1.0, 1.0, 0.0]]]))
    # Gates: sigmoid(1 + 2), sigmoid(2 - 2), sigmoid(-2 + 0).
    torch.testing.assert_close(attention(torch.tensor([[1.0, 2.0, -2.0]])), torch.tensor([[0.952574, 1.0, -0.238406]]))


def test_gating_the_map_before_the_mean_gives_the_same():
    attention, last_map = EfficientChannelAttention(), torch.randn(2, 7, 3, 3)
    mean = last_map.mean(dim=(2, 3))
    gates = attention.convolution(mean.unsqueeze(1)).squeeze(1).sigmoid()
    torch.testing.assert_close(attention(mean), (last_map * gates[:, :, None, None]).mean(dim=(2, 3)))


def test_a_member_has_128_numbers_of_a_form_however_short():
    for width in (1, 2, 81):
        member = Member(3, 2, 0.0).eval()
        assert member.metadata_network(torch.randn(4, 1, width)).shape == (4, 128)
        logits, hidden = member(torch.randn(4, 3), torch.randn(4, width))
        assert (logits.shape, hidden.shape) == ((4, 2), (4, 256))
        assert (hidden >= 0).all()
