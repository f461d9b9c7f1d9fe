import pytest
import torch

from dualrefnet.errors import RecipeError
from dualrefnet.models.encoders import BACKBONES, Encoded, EncoderOutput, backbone_spec, create_encoder

FEATURES = {
    "vgg13": 512,
    "resnet50": 2048,
    "mobilenet_v2": 1280,
    "efficientnet_b4": 1792,
    "densenet121": 1024,
    "efficientnet_lite0": 1280,
    "efficientnet_lite1": 1280,
    "efficientnet_lite2": 1280,
    "swin_b": 1024,
    "vit_b_16": 768,
    "convit_b": 768,
    "beit_b_16": 768,
}
# timm's own vector of these, without a classifier, is the one that the encoder gives.
TRANSFORMERS = [name for name, spec in BACKBONES.items() if spec.kind == "transformer"]


def test_every_backbone_has_its_row_here():
    assert set(FEATURES) == set(BACKBONES)


@pytest.mark.parametrize("name", BACKBONES)
def test_the_encoder_keeps_its_contract_and_every_parameter_gets_a_gradient(name):
    encoder = create_encoder(name, weights="none", image_size=64)
    spec = BACKBONES[name]
    side = 64 // spec.stride
    output = encoder.train()(torch.randn(2, 3, 64, 64))
    assert output.map.shape == (2, FEATURES[name], side, side)
    assert output.vector.shape == (2, FEATURES[name])
    assert (encoder.features, encoder.stride, encoder.name) == (FEATURES[name], spec.stride, name)
    assert sum(parameter.numel() for parameter in encoder.parameters()) / 1e6 == pytest.approx(spec.parameters, abs=0.2)
    if not spec.class_token and name != "beit_b_16":
        torch.testing.assert_close(output.vector, output.map.mean(dim=(2, 3)))
        (gradient,) = torch.autograd.grad(output.vector[0, 3], output.map, retain_graph=True)
        torch.testing.assert_close(gradient[0, 3], torch.full((side, side), 1 / side**2))
    output.vector.sum().backward()
    assert [key for key, parameter in encoder.named_parameters() if parameter.grad is None] == []


def test_the_vector_of_a_vision_transformer_is_its_class_token_and_the_map_keeps_the_places():
    encoder = create_encoder("vit_b_16", weights="none", image_size=64).eval()
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        tokens = encoder.body.forward_features(image)
        output = encoder(image)
    torch.testing.assert_close(output.vector, tokens[:, 0])
    # The token of row 2, column 1 on the 4x4 grid, after the class token.
    torch.testing.assert_close(output.map[:, :, 2, 1], tokens[:, 1 + 2 * 4 + 1])


def test_the_vector_of_beit_is_the_normalised_mean_of_its_places():
    encoder = create_encoder("beit_b_16", weights="none", image_size=64).eval()
    with torch.no_grad():
        encoder.body.fc_norm.weight.fill_(2.0)
        encoder.body.fc_norm.bias.fill_(5.0)
        output = encoder(torch.randn(2, 3, 64, 64))
    mean = output.map.mean(dim=(2, 3))
    standard = (mean - mean.mean(dim=1, keepdim=True)) / mean.std(dim=1, keepdim=True, correction=0)
    torch.testing.assert_close(output.vector, 2 * standard + 5, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_the_vector_of_a_transformer_is_timms_own(name):
    encoder = create_encoder(name, weights="none", image_size=64).eval()
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(encoder(image).vector, encoder.body(image))


@pytest.mark.parametrize("name", BACKBONES)
def test_taps_come_on_request_and_change_nothing_else(name):
    plain = create_encoder(name, weights="none", image_size=64).eval()
    tapped = create_encoder(name, weights="none", image_size=64, taps=True).eval()
    tapped.load_state_dict(plain.state_dict())
    image = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        before, after = plain(image), tapped(image)
    assert (plain.tap_features, before.taps) == ((), ())
    torch.testing.assert_close(after.map, before.map)
    torch.testing.assert_close(after.vector, before.vector)
    assert [tap.shape[1] for tap in after.taps] == list(tapped.tap_features)
    sides = [tap.shape[2] for tap in (*after.taps, after.map)]
    assert sides == sorted(sides, reverse=True)
    assert all(tap.shape[2] == tap.shape[3] for tap in after.taps)
    # From one network, and not one map twice.
    assert len({float(tap.std()) for tap in after.taps}) == len(after.taps) == 3


def test_taps_of_the_papers_encoders_are_the_ends_of_stages():
    # Sides at 64 px: strides 4, 8 and 16 of ResNet and DenseNet; VGG's before the pooling of each block.
    expected = {
        "vgg13": [(128, 32), (256, 16), (512, 8)],
        "resnet50": [(256, 16), (512, 8), (1024, 4)],
        "densenet121": [(256, 16), (512, 8), (1024, 4)],
        "mobilenet_v2": [(32, 8), (96, 4), (320, 2)],
        "efficientnet_b4": [(56, 8), (160, 4), (448, 2)],
    }
    for name, shapes in expected.items():
        encoder = create_encoder(name, weights="none", image_size=64, taps=True).eval()
        with torch.no_grad():
            assert [tuple(tap.shape[1:3]) for tap in encoder(torch.randn(1, 3, 64, 64)).taps] == shapes, name


def test_what_was_encoded_before_passes_through():
    outputs = tuple(EncoderOutput(None, torch.full((1, 1280), float(number))) for number in range(3))
    for position in range(3):
        encoder = create_encoder("mobilenet_v2", weights="none", image_size=64, position=position)
        assert encoder(Encoded(outputs)) is outputs[position]


@pytest.mark.parametrize("name", ["mobilenet_v2", "densenet121"])
def test_a_frozen_encoder_stays_as_it_is_in_training(name):
    torch.manual_seed(0)
    encoder = create_encoder(name, weights="none", image_size=64)
    image = torch.randn(4, 3, 64, 64)
    before = {key: tensor.clone() for key, tensor in encoder.state_dict().items()}
    encoder.freeze()
    model = torch.nn.Sequential(encoder).train()
    assert model.training
    assert not any(module.training for module in encoder.modules())
    output = encoder(image)
    assert not output.vector.requires_grad
    assert all(torch.equal(tensor, before[key]) for key, tensor in encoder.state_dict().items())
    free = create_encoder(name, weights="none", image_size=64).train()
    free.load_state_dict(before)
    free(image)
    changed = {key for key, tensor in free.state_dict().items() if not torch.equal(tensor, before[key])}
    assert any(key.endswith("running_mean") for key in changed), "or there was nothing to keep"


def test_mobilenet_makes_seven_by_seven_of_224():
    encoder = create_encoder("mobilenet_v2", weights="none").eval()
    with torch.no_grad():
        assert encoder(torch.zeros(1, 3, 224, 224)).map.shape == (1, 1280, 7, 7)


def test_the_map_of_densenet_is_taken_after_the_relu():
    encoder = create_encoder("densenet121", weights="none", image_size=64).eval()
    with torch.no_grad():
        assert encoder(torch.randn(1, 3, 64, 64)).map.min() >= 0


@pytest.mark.parametrize("name", ["mobilenet_v2", "convit_b"])
def test_an_exported_encoder_computes_the_same(name):
    encoder = create_encoder(name, weights="none", image_size=64).eval()
    image = torch.randn(3, 3, 64, 64)
    batch = torch.export.Dim("batch", min=1, max=64)
    exported = torch.export.export(encoder, (torch.randn(2, 3, 64, 64),), dynamic_shapes=({0: batch},)).module()
    with torch.no_grad():
        torch.testing.assert_close(exported(image)[1], encoder(image).vector, rtol=1e-4, atol=1e-5)


def test_convit_gives_the_same_the_first_time_and_later():
    encoder = create_encoder("convit_b", weights="none", image_size=48).eval()
    before = {name: buffer.clone() for name, buffer in encoder.named_buffers()}
    with torch.no_grad():
        encoder(torch.randn(1, 3, 48, 48))
    after = dict(encoder.named_buffers())
    assert before.keys() == after.keys()
    for name, buffer in before.items():
        torch.testing.assert_close(buffer, after[name])


def test_an_encoder_can_be_built_again_from_its_options():
    first = create_encoder("mobilenet_v2", weights="none", image_size=64, options={"pad_type": "same"}).eval()
    assert first.options == {"pad_type": "same"}
    again = create_encoder("mobilenet_v2", weights="none", image_size=64, options=first.options).eval()
    again.load_state_dict(first.state_dict())
    other = create_encoder("mobilenet_v2", weights="none", image_size=64).eval()
    other.load_state_dict(first.state_dict())
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(again(image).vector, first(image).vector)
        assert not torch.allclose(other(image).vector, first(image).vector), (
            "the padding must matter, or options are needless"
        )


def test_options_with_weights_to_load_are_refused():
    with pytest.raises(ValueError, match="weights none"):
        create_encoder("mobilenet_v2", weights="auto", options={"pad_type": "same"})


@pytest.mark.parametrize(
    ("name", "size", "nearest"),
    [("mobilenet_v2", 230, 224), ("vit_b_16", 230, 224), ("swin_b", 250, 256), ("resnet50", 3, 32)],
)
def test_an_illegal_image_size_names_the_nearest_legal_one(name, size, nearest):
    with pytest.raises(RecipeError, match=f"not {size}; the nearest is {nearest}$"):
        create_encoder(name, weights="none", image_size=size)


def test_an_unknown_backbone_is_refused_with_a_suggestion():
    with pytest.raises(RecipeError, match="did you mean 'mobilenet_v2'"):
        create_encoder("mobilenetv2")
    with pytest.raises(RecipeError, match="there are: vgg13, resnet50"):
        backbone_spec("zzz")
