import pytest
import torch
from torch import Tensor, nn

from dualrefnet.errors import RunError
from dualrefnet.files import write_tensors
from dualrefnet.models.backbones import BACKBONES
from dualrefnet.models.base import Method, Output, mark_missing
from dualrefnet.models.encoders import Encoded, EncoderOutput
from dualrefnet.models.registry import METHODS, load_model, new_model
from dualrefnet.recipe import WITH_DECODER, Recipe, load_recipe

# A method knows its encoder by the lengths of vector, taps and map alone, so one encoder stands for all, but for a
# decoder of stride 16, taps of a transformer and the encoder of a publication.
QUICK = {("vit_b_16", "dualrefnet"), ("swin_b", "visual"), ("beit_b_16", "deepmetaforge")}
QUICK |= {("mobilenet_v2", method) for method in METHODS}
PAIRS = [
    pytest.param(backbone, method, marks=[] if (backbone, method) in QUICK else [pytest.mark.slow])
    for backbone in BACKBONES
    for method in METHODS
    if METHODS[method].reads_image
]
# A method that reads no image has no encoder: for it one backbone's name is as good as another.
IMAGELESS = [("mobilenet_v2", name) for name, method in METHODS.items() if not method.reads_image]


# Four columns of values, and four that say which of them are missing.
WIDTH, CLASSES = 8, 6


def recipe_of(method: str, backbone: str, **overrides: object) -> Recipe:
    values = {"model.method": method, "model.backbone": backbone, "model.weights": "none", "image.size": 32}
    if method == "ensemble":
        # Three transformers would be a gigabyte.
        values["model.members"] = (backbone, "mobilenet_v2", "efficientnet_lite0")
    return load_recipe({"name": "contract"}, {**values, **overrides})


@pytest.mark.parametrize("method", METHODS)
def test_hidden_is_what_the_last_layer_reads_and_features_what_was_fused(method: str) -> None:
    torch.manual_seed(0)
    model = new_model(recipe_of(method, "mobilenet_v2"), WIDTH, CLASSES)[0].eval()
    image = torch.randn(2, 3, 32, 32) if METHODS[method].reads_image else None
    read: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module.out_features == CLASSES:
            module.register_forward_pre_hook(lambda module, inputs, name=name: read.update({name: inputs[0]}))
    with torch.inference_mode():
        output = model(image, torch.randn(2, WIDTH))
    # Of JIF-MMFA the head of both modalities; the others are of one.
    last = [value for name, value in read.items() if method != "jif_mmfa" or name == "joint_head"]
    torch.testing.assert_close(output.hidden, torch.cat(last, dim=1))
    widths = {"dualrefnet": (1280 + 512, 256), "auxnet": (1280 + 512, 256), "metadata_only": (512, 256)}
    widths |= {"hmfb": (1280, output.hidden.shape[1]), "visual": (4 * 1280, output.hidden.shape[1])}
    widths |= {"deepmetaforge": (2 * 1280, 512)}
    if method in widths:
        assert (output.features.shape[1], output.hidden.shape[1]) == widths[method]
        assert output.hidden.shape[1] < output.features.shape[1]
    elif method != "ensemble":
        assert output.hidden is output.features


def without_gradient(model: nn.Module) -> set[str]:
    # A gradient of zero is one: ResNet starts with the last normalisation of each block at zero, and what lies before
    # it waits.
    return {name for name, parameter in model.named_parameters() if parameter.grad is None}


def everything(output: Output) -> Tensor:
    parts = [output.logits, *output.heads.values(), *([] if output.reconstruction is None else [output.reconstruction])]
    return torch.stack([part.square().mean() for part in parts]).sum()


@pytest.mark.parametrize(("backbone", "method"), [*PAIRS, *IMAGELESS])
def test_every_method_with_every_backbone_keeps_the_contract(backbone: str, method: str, tmp_path) -> None:
    torch.manual_seed(0)
    # Two pixels of map, so that batch normalisation has something to normalise; transformers take 64 px as well.
    model, architecture, sources = new_model(recipe_of(method, backbone, **{"image.size": 64}), WIDTH, CLASSES)
    assert isinstance(model, METHODS[method].network)
    assert [source["kind"] for source in sources] == ["none"] * max(1, len(model.encoders))
    image, form = torch.randn(2, 3, 64, 64) if METHODS[method].reads_image else None, torch.randn(2, WIDTH)

    output = model.train()(image, form)
    assert isinstance(output, Output)
    assert output.logits.shape == (2, CLASSES)
    assert output.features.dim() == 2
    assert len(output.features) == 2
    assert all(scores.shape == (2, CLASSES) for scores in output.heads.values())
    assert (output.reconstruction is None) is (method not in WITH_DECODER)
    if output.reconstruction is not None:
        assert output.reconstruction.shape == (2, 3, 128, 128)
    everything(output).backward()
    assert without_gradient(model) == set()

    model.eval()
    if hasattr(model, "decision"):
        model.decision.weights.copy_(torch.tensor([0.5, 0.25, 0.25]))
    with torch.no_grad():
        before = model(image, form)
        assert before.reconstruction is None, "inference must not pay for the decoder"
        # A form of which nothing is known: zeros alone, and zeros with the columns that say so.
        for empty in (torch.zeros(2, WIDTH), torch.cat([torch.zeros(2, 4), torch.ones(2, 4)], dim=1)):
            assert torch.isfinite(model(image, empty).logits).all()

    write_tensors(tmp_path / "model.safetensors", model.state_dict())
    again = load_model(
        {"architecture": architecture.model_dump(mode="json"), "weights": sources}, tmp_path / "model.safetensors"
    ).eval()
    with torch.no_grad():
        assert torch.equal(again(image, form).logits, before.logits)


@pytest.mark.parametrize(("backbone", "method"), PAIRS)
def test_every_method_learns_from_what_frozen_encoders_gave(backbone: str, method: str) -> None:
    torch.manual_seed(0)
    recipe = recipe_of(method, backbone, **{"image.size": 64, "training.encoder": "frozen"})
    model, _, _ = new_model(recipe, WIDTH, CLASSES)
    image, form = torch.randn(2, 3, 64, 64), torch.randn(2, WIDTH)
    given: list[EncoderOutput] = []
    hooks = [
        encoder.register_forward_hook(lambda module, inputs, output: given.append(output)) for encoder in model.encoders
    ]
    with torch.no_grad():
        from_image = model.eval()(image, form)
    for hook in hooks:
        hook.remove()
    # The map is as a rule not kept: only methods that say so may read it.
    kept = Encoded(tuple(output if model.maps(recipe.model) else output._replace(map=None) for output in given))
    with torch.no_grad():
        assert torch.equal(model(kept, form).logits, from_image.logits)
    everything(model.train()(kept, form)).backward()
    assert without_gradient(model) == {name for name, _ in model.named_parameters() if name.startswith("encoders.")}


# BEiT normalises its vector after its map: a fusion that read the map alone would leave that layer without a gradient.
@pytest.mark.parametrize(
    ("backbone", "key", "value"),
    [
        ("mobilenet_v2", "fusion", "hadamard"),
        ("mobilenet_v2", "fusion", "cross_attention"),
        ("beit_b_16", "fusion", "cross_attention"),
        ("mobilenet_v2", "metadata_encoder", "attention"),
        ("mobilenet_v2", "metadata_encoder", "transformer"),
    ],
)
def test_in_every_ablation_every_parameter_gets_a_gradient(backbone: str, key: str, value: str) -> None:
    overrides = {"image.size": 64, "model.decoder": "none", f"model.{key}": value}
    model, _, _ = new_model(recipe_of("dualrefnet", backbone, **overrides), WIDTH, CLASSES)
    everything(model.train()(torch.randn(2, 3, 64, 64), torch.randn(2, WIDTH))).backward()
    assert without_gradient(model) == set()


def test_every_method_says_what_it_is() -> None:
    for name, method in METHODS.items():
        assert method.title, name
        assert method.reference, name
    assert len({method.title for method in METHODS.values()}) == len(METHODS)
    # A method that fills in what isn't known says so where a reader of the code looks, too.
    for method in METHODS.values():
        if method.reconstruction:
            assert any(word in str(method.__doc__) for word in ("reconstruction", "our reading", "Not faithful")), (
                method.title
            )


def turned(image: Tensor, views: int) -> list[Tensor]:
    copies = [image, image.flip(-1), image.flip(-2), image.flip(-1).flip(-2)]
    return [*copies, *(copy.transpose(-1, -2) for copy in copies)][:views]


@pytest.mark.parametrize("views", [2, 4, 8])
@pytest.mark.parametrize("method", ["dualrefnet", "metablock", "visual"])
def test_a_prediction_over_views_is_the_same_for_every_flipped_copy(method: str, views: int) -> None:
    torch.manual_seed(0)
    model = new_model(recipe_of(method, "mobilenet_v2", **{"model.views": views, "image.size": 64}), WIDTH, CLASSES)[0]
    image, metadata = torch.randn(2, 3, 64, 64), torch.randn(2, WIDTH)
    with torch.no_grad():
        # In training mode an image is read as it is.
        assert len(model.train().encode(image).first.vector) == 2
        model.eval()
        found = [model(copy, metadata).logits for copy in turned(image, views)]
        vectors = torch.stack([model.read(copy).first.vector for copy in turned(image, views)]).mean(dim=0)
        torch.testing.assert_close(model.encode(image).first.vector, vectors)
        alone = model.answer(model.read(image), metadata).logits
    for logits in found[1:]:
        torch.testing.assert_close(logits, found[0], rtol=1e-3, atol=1e-4)
    assert not torch.allclose(alone, found[0], atol=1e-6)


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if not method.needs_metadata])
def test_without_metadata_the_image_vector_is_classified_alone(method: str) -> None:
    model, _, _ = new_model(
        recipe_of(method, "mobilenet_v2", **{"metadata.tier": "M0", "model.decoder": "none"}), 0, CLASSES
    )
    output = model.train()(torch.randn(2, 3, 32, 32), torch.empty(2, 0))
    assert output.features.shape == (2, 1280)
    assert output.reconstruction is None


def test_a_model_that_is_loaded_expects_the_images_of_the_one_that_was_saved(tmp_path) -> None:
    model, architecture, sources = new_model(recipe_of("ensemble", "mobilenet_v2"), 5, CLASSES)
    model.scales[1] = 3.0
    write_tensors(tmp_path / "model.safetensors", model.state_dict())
    sources[2] |= {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    again = load_model(
        {"architecture": architecture.model_dump(mode="json"), "weights": sources}, tmp_path / "model.safetensors"
    )
    assert (again.encoders[2].mean, again.encoders[2].std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert torch.equal(again.scales, model.scales)


def test_missing_or_foreign_parameters_are_refused(tmp_path) -> None:
    model, architecture, sources = new_model(recipe_of("metadata_only", "mobilenet_v2"), 5, CLASSES)
    description = {"architecture": architecture.model_dump(mode="json"), "weights": sources}
    file = tmp_path / "model.safetensors"
    with pytest.raises(RunError, match="first epoch"):
        load_model(description, file)
    state, name = model.state_dict(), "head.classifier.bias"
    whole = {"other": torch.zeros(1), name: torch.zeros(7), "head.hidden.bias": torch.full((256,), torch.nan)}
    for damage in (*({key: value} for key, value in whole.items()), {name: torch.zeros(CLASSES, dtype=torch.int64)}):
        write_tensors(file, {**state, **damage})
        with pytest.raises(RunError, match=rf"doesn't fit its model\.json.*{next(iter(damage))}$"):
            load_model(description, file)
    write_tensors(file, state)
    content = file.read_bytes()
    for damaged in (b"no tensors at all", b"", content[:-1], b"\xff" * 8 + content[8:]):
        file.write_bytes(damaged)
        with pytest.raises(RunError, match="can't be read"):
            load_model(description, file)
    description["architecture"]["section"]["method"] = "of_the_future"
    with pytest.raises(RunError, match="of_the_future"):
        load_model(description, file)


def small(method: str) -> Method:
    return new_model(recipe_of(method, "mobilenet_v2"), 5, CLASSES)[0]


NAN = float("nan")


TINY = {"model.weights": "none", "model.backbone": "mobilenet_v2", "image.size": 32, "modality_dropout": {"image": 0.2}}


def tiny(method: str = "dualrefnet") -> Method:
    torch.manual_seed(0)
    return new_model(load_recipe("pad_ufes_20", {**TINY, "model.method": method}), 5, 3)[0]


def some_input(method: Method) -> tuple[torch.Tensor | None, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    images, forms = torch.rand(4, 3, 32, 32, generator=generator), torch.rand(4, 5, generator=generator)
    return images if method.reads_image else None, forms


@pytest.mark.parametrize("name", METHODS)
def test_every_method_answers_with_gaps_in_training_and_after(name: str) -> None:
    model = tiny(name)
    images, forms = some_input(model)
    if model.reads_metadata:
        forms[0, 1:3], forms[2] = NAN, NAN
    absent = torch.tensor([False, True, False, False])
    for training in (True, False):
        read = None if images is None else model.train(training).encode(images)
        read = mark_missing(read, absent) if read is not None and not model.needs_image else read
        assert torch.isfinite(model.train(training)(read, forms).logits).all()
    if images is not None and not model.needs_image:
        images[1] = NAN
        assert torch.allclose(model(read, forms).logits, model(images, forms).logits, atol=1e-5)


def test_a_gap_is_answered_as_the_token_written_in_its_place() -> None:
    model = tiny().eval()
    images, forms = some_input(model)
    with torch.no_grad():
        model.missing.columns.copy_(torch.tensor([0.3, -1.0, 2.0, 0.0, 5.0]))
    gap, written = forms.clone(), forms.clone()
    gap[1, 2], gap[3] = NAN, NAN
    written[1, 2], written[3] = 2.0, model.missing.columns.detach()
    assert torch.equal(model(images, gap).logits, model(images, written).logits)
    assert not torch.allclose(model(images, gap).logits[1], model(images, forms).logits[1])
