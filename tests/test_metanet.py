import torch

from dualrefnet.models.encoders import BACKBONES
from dualrefnet.models.metanet import GROUP
from stand_in import build, given, set_linear


def test_the_form_gates_every_channel():
    model = build("metanet", features=2, metadata_width=2)
    set_linear(model.gate[0], [[1, 0], [0, 1]], [0, 1])
    set_linear(model.classifier, [[1, 1], [1, 0]], [0, 0.5])
    output = model(given([3.0, -4.0]), torch.tensor([[0.0, 1.0]]))
    # sigmoid(0) = .5 and sigmoid(2) = .880797.
    torch.testing.assert_close(output.features, torch.tensor([[1.5, -3.523188]]))
    torch.testing.assert_close(output.logits, torch.tensor([[-2.023188, 2.0]]))


def test_gating_the_map_before_the_mean_gives_the_same():
    model = build("metanet", features=3, metadata_width=4)
    last_map, form = torch.randn(1, 3, 2, 2), torch.randn(1, 4)
    gated = (last_map * model.gate(form)[:, :, None, None]).mean(dim=(2, 3))
    torch.testing.assert_close(model(given(last_map.mean(dim=(2, 3))[0].tolist()), form).features, gated)


def test_in_the_reimplementation_one_gate_of_two_layers_belongs_to_64_channels():
    model = build("metanet", features=128, metadata_width=1, metanet_variant="mb_compat")
    set_linear(model.gate[0], [[1.0]] + [[0.0]] * 63)
    set_linear(model.gate[2], [[1.0] + [0.0] * 63, [-1.0] + [0.0] * 63])
    features = model(given([1.0] * 128), torch.tensor([[2.0]])).features
    torch.testing.assert_close(features, torch.tensor([[0.880797] * 64 + [0.119203] * 64]), atol=1e-6, rtol=0)
    # Below zero the ReLU between the layers holds both gates at sigmoid(0).
    torch.testing.assert_close(model(given([1.0] * 128), torch.tensor([[-2.0]])).features, torch.full((1, 128), 0.5))


def test_every_encoder_fits_the_reimplementation():
    assert all(spec.features % GROUP == 0 for spec in BACKBONES.values())
