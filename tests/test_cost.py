"""What methods cost, against numbers reckoned by hand."""

from itertools import pairwise

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from dualrefnet.models.encoders import create_encoder
from dualrefnet.models.inference import resolve_precision
from dualrefnet.models.registry import new_model
from dualrefnet.recipe import load_recipe
from dualrefnet.run import Run
from dualrefnet.training.cost import measure_costs, network_cost, training_memory
from dualrefnet.training.modality_dropout import ModalityViews, modality_shares

WIDTHS = [73, 64, 128, 256, 512, 256, 6]
PRODUCTS = [before * after for before, after in pairwise(WIDTHS)]
SMALL = {"image.size": 32, "model.backbone": "mobilenet_v2", "model.weights": "none"}


def test_metadata_alone_costs_what_its_layers_have() -> None:
    (row,) = measure_costs([], ["metadata_only"]).to_dict("records")
    assert row["multiply_adds"] == sum(PRODUCTS)
    assert row["parameters"] == sum(PRODUCTS) + sum(WIDTHS[1:])
    # Weights, gradients and momentum; of each image what every layer reads, and its log-probabilities.
    kept = 32 * sum(WIDTHS)
    assert row["training_bytes"] == pytest.approx(4 * (3 * row["parameters"] + kept), rel=0.01)


def test_a_convolution_is_counted_at_every_place_and_the_decoder_not_at_all() -> None:
    recipe = load_recipe("pad_ufes_20_paper", SMALL)
    model, architecture, _ = new_model(recipe, 5, 6)
    cost = network_cost(model, architecture)
    decoder = sum(value.numel() for value in model.decoder.parameters())
    assert cost["parameters"] == sum(value.numel() for value in model.parameters()) - decoder
    expected = 0

    def count(module: nn.Module, given: tuple[torch.Tensor, ...], result: torch.Tensor) -> None:
        nonlocal expected
        if isinstance(module, nn.Conv2d):
            expected += result[0].numel() * module.weight[0].numel()
        elif isinstance(module, nn.Linear):
            expected += module.weight.numel()

    for module in model.modules():
        module.register_forward_hook(count)
    with torch.no_grad():
        model.eval()(torch.zeros(1, 3, 32, 32), torch.zeros(1, 5))
    assert cost["multiply_adds"] == expected
    larger = load_recipe(recipe, {"training.batch_size": 64})
    adam = load_recipe(recipe, {"training.optimizer": "adamw"})
    memory = [training_memory(model, architecture, some) for some in (recipe, larger, adam)]
    parameters = cost["parameters"] + decoder
    assert memory[2] - memory[0] == 4 * parameters
    # What isn't of the parameters grows with the batch.
    assert memory[1] - 12 * parameters == pytest.approx(2 * (memory[0] - 12 * parameters), rel=0.01)


@pytest.mark.parametrize("method", ["dualrefnet", "visual", "metadata_only"])
def test_shapes_alone_cost_the_same_and_training_needs_the_decoder(method: str) -> None:
    recipe = load_recipe("pad_ufes_20_paper", SMALL | {"model.method": method})
    real, architecture, _ = new_model(recipe, 5, 6)
    with torch.device("meta"):
        shapes, _, _ = new_model(recipe, 5, 6)
    with FakeTensorMode(allow_non_fake_inputs=True):
        shapes.to_empty(device="cpu")
        training = network_cost(shapes, architecture, training=True)
        assert network_cost(shapes, architecture) == network_cost(real, architecture)
    assert shapes.training
    assert training["parameters"] == sum(value.numel() for value in real.parameters())
    # Six doublings of the side: a transposed convolution of 4 x 4 reads each of its places once.
    widths = [1280, 256, 128, 64, 32, 16, 3] if method == "dualrefnet" else []
    decoder = sum(16 * before * after * 4**stage for stage, (before, after) in enumerate(pairwise(widths)))
    assert training["multiply_adds"] == network_cost(real, architecture)["multiply_adds"] + decoder


def test_a_run_keeps_its_cost(tiny_run: Run) -> None:
    cost = tiny_run.model["cost"]
    assert 2.2e6 < cost["parameters"] < 3.5e6
    assert 5e6 < cost["multiply_adds"] < 1e7


def test_a_training_step_costs_little_more_than_its_encoder() -> None:
    size = {"image.size": 64, "model.weights": "none"}
    for backbone, most in (("efficientnet_lite0", 1.3), ("resnet50", 1.05)):
        counts = []
        for method in ("dualrefnet", "no_metadata"):
            recipe = load_recipe("pad_ufes_20", {**size, "model.backbone": backbone, "model.method": method})
            model, architecture, _ = new_model(recipe, 81, 6)
            views = ModalityViews(model.train(), list(modality_shares(model, recipe.modality_dropout)))
            # Of the forward pass: backward passes of grouped convolutions are counted as if they had no groups.
            with FlopCounterMode(display=False) as counter:
                output, _ = views(torch.zeros(4, 3, 64, 64), torch.zeros(4, architecture.metadata_width))
            assert (output.reconstruction is not None) == (method == "dualrefnet")
            counts.append(counter.get_total_flops())
        assert 1 <= counts[0] / counts[1] < most, backbone


@pytest.mark.parametrize(
    ("capabilities", "backbone", "precision"),
    [
        ({}, "resnet50", "fp32"),
        ({"avx512_bf16": True}, "resnet50", "bf16"),
        ({"avx512_bf16": True}, "efficientnet_lite0", "fp32"),
        ({"avx512_bf16": True, "amx_bf16": True}, "efficientnet_lite0", "bf16"),
    ],
)
def test_a_cpu_trains_in_the_faster_precision(
    capabilities: dict[str, bool], backbone: str, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    cpu, encoder = torch.device("cpu"), create_encoder(backbone, "none", 32)
    assert resolve_precision("auto", cpu, encoder) == precision
    assert resolve_precision("auto", cpu) == ("bf16" if capabilities else "fp32")
    assert resolve_precision("bf16", cpu, encoder) == "bf16"
