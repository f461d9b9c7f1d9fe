import pytest
import torch
from torch import nn

from dualrefnet.errors import RecipeError, RunError
from dualrefnet.files import write_tensors
from dualrefnet.models.backbones import BACKBONES
from dualrefnet.models.metadata_encoders import metadata_mlp
from dualrefnet.models.output import Output
from dualrefnet.models.registry import METHODS, WITHOUT_IMAGE, load_model, new_model
from dualrefnet.recipe import Recipe, load_recipe

# A method that reads no image has no encoder: for it one backbone's name is as good as another.
PAIRS = [(method, name) for method in METHODS for name in BACKBONES if method not in WITHOUT_IMAGE or name == "mobilenet_v2"]
# Fused length D + 512 of the paper's backbones (D + 512 with the metadata network's last width).
FUSED = {"vgg13": 1024, "resnet50": 2560, "mobilenet_v2": 1792, "efficientnet_b4": 2304, "densenet121": 1536}


def recipe_of(method: str, backbone: str, **overrides: object) -> Recipe:
    values = {"model.method": method, "model.backbone": backbone, "model.weights": "none", "image.size": 32}
    return load_recipe({"name": "contract"}, {**values, **overrides})


def gradients_missing(model: nn.Module) -> list[str]:
    # A gradient of zero is one: ResNet starts with the last normalisation of each block at zero, and what lies before it waits.
    return [name for name, parameter in model.named_parameters() if parameter.grad is None]


@pytest.mark.parametrize(("method", "backbone"), PAIRS)
def test_every_method_with_every_backbone_keeps_the_contract(method: str, backbone: str, tmp_path) -> None:
    torch.manual_seed(0)
    # Two pixels of map, so that batch normalisation has something to normalise; transformers take 64 px as well.
    recipe = recipe_of(method, backbone, **{"image.size": 64})
    model, architecture, source = new_model(recipe, metadata_width=7, classes=6)
    image, metadata = torch.randn(2, 3, 64, 64), torch.randn(2, 7)
    output = model.train()(None if method in WITHOUT_IMAGE else image, metadata)
    assert isinstance(output, Output)
    assert output.logits.shape == (2, 6)
    assert output.features.shape[0] == 2
    total = output.logits.square().sum()
    if method == "dualrefnet":
        assert output.reconstruction is not None
        assert output.reconstruction.shape == (2, 3, 128, 128)
        total = total + output.reconstruction.square().sum()
    else:
        assert output.reconstruction is None
    total.backward()
    assert gradients_missing(model) == []
    model.eval()
    with torch.no_grad():
        before = model(image, metadata)
    assert before.reconstruction is None, "inference must not pay for the decoder"
    write_tensors(tmp_path / "model.safetensors", model.state_dict())
    description = {"architecture": architecture.model_dump(mode="json"), "weights": source}
    again = load_model(description, tmp_path / "model.safetensors").eval()
    with torch.no_grad():
        assert torch.equal(again(image, metadata).logits, before.logits)


@pytest.mark.parametrize(("backbone", "fused"), FUSED.items())
def test_fused_lengths_are_those_of_the_specification(backbone: str, fused: int) -> None:
    model, _, _ = new_model(recipe_of("dualrefnet", backbone), metadata_width=73, classes=6)
    assert model.head.hidden.in_features == fused
    assert model.head.hidden.out_features == 256
    assert model.head.classifier.out_features == 6


def test_the_metadata_network_has_four_layers_and_no_last_relu() -> None:
    network = metadata_mlp(73, (64, 128, 256, 512))
    assert [layer.out_features for layer in network if isinstance(layer, nn.Linear)] == [64, 128, 256, 512]
    assert [type(layer) for layer in network][-2:] == [nn.ReLU, nn.Linear]
    assert (network(torch.randn(64, 73)) < 0).any()


def test_without_metadata_the_image_vector_is_classified_alone() -> None:
    model, _, _ = new_model(recipe_of("dualrefnet", "mobilenet_v2", **{"metadata.tier": "M0", "model.decoder": "none"}), 0, 6)
    output = model.train()(torch.randn(2, 3, 32, 32), torch.empty(2, 0))
    assert output.features.shape == (2, 1280)
    assert output.reconstruction is None


def test_metadata_change_the_answer_of_dualrefnet_and_not_of_the_image_baseline() -> None:
    image = torch.randn(1, 3, 32, 32)
    for method, changes in (("dualrefnet", True), ("no_metadata", False)):
        model = new_model(recipe_of(method, "mobilenet_v2"), 5, 6)[0].eval()
        with torch.no_grad():
            answers = [model(image, torch.full((1, 5), value)).logits for value in (0.0, 1.0)]
        assert torch.equal(*answers) is not changes


def test_unknown_names_are_refused_with_the_names_there_are() -> None:
    with pytest.raises(RecipeError, match=r"dualrefnt.*dualrefnet, no_metadata"):
        new_model(recipe_of("dualrefnt", "mobilenet_v2"), 5, 6)
    with pytest.raises(RecipeError, match="resnet50"):
        new_model(recipe_of("dualrefnet", "resnet-50"), 5, 6)


def test_missing_or_foreign_parameters_are_refused(tmp_path) -> None:
    _, architecture, source = new_model(recipe_of("metadata_only", "mobilenet_v2"), 5, 6)
    description = {"architecture": architecture.model_dump(mode="json"), "weights": source}
    with pytest.raises(RunError, match="first epoch"):
        load_model(description, tmp_path / "model.safetensors")
    write_tensors(tmp_path / "model.safetensors", {"other": torch.zeros(1)})
    with pytest.raises(RunError, match="doesn't fit"):
        load_model(description, tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").write_bytes(b"no tensors at all")
    with pytest.raises(RunError, match="doesn't fit"):
        load_model(description, tmp_path / "model.safetensors")
