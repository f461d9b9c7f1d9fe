"""Learned tokens: what stands for a missing field or photograph, and what doesn't leak from it."""

import pytest
import torch
from torch import nn

from dualrefnet.models.base import Method, mark_missing
from dualrefnet.models.encoders import Encoded, EncoderOutput
from dualrefnet.models.registry import METHODS, new_model
from dualrefnet.recipe import load_recipe

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


def test_a_photograph_that_is_not_there_is_answered_as_the_token() -> None:
    model = tiny().eval()
    images, forms = some_input(model)
    with torch.no_grad():
        nn.init.normal_(model.missing.places[0])
    images[1:3] = NAN
    token = model.missing.places[0].detach()
    vector = model(images, forms).features[:, : len(token)]
    assert torch.equal(vector[1], token)
    assert torch.equal(vector[2], token)
    assert not torch.allclose(vector[0], token)


def test_without_tokens_a_gap_is_not_filled_in_silence() -> None:
    model = new_model(load_recipe("pad_ufes_20_m3", {"model.weights": "none", "image.size": 32}), 5, 3)[0].eval()
    images, forms = some_input(model)
    forms[0, 0] = NAN
    assert model.missing is None
    assert model(images, forms).logits[0].isnan().all()


def test_the_tokens_learn_and_what_they_replace_does_not() -> None:
    model = tiny().train()
    images, forms = some_input(model)
    forms[1, 4] = NAN
    images.requires_grad_(), forms.requires_grad_()
    # Without the normalisation layers, which let every image touch every other.
    read = mark_missing(model.eval().encode(images), torch.tensor([True, False, False, False]))
    model(read, forms).logits.square().sum().backward()
    assert model.missing.places[0].grad.abs().sum() > 0
    assert model.missing.columns.grad[4] != 0
    assert (model.missing.columns.grad[:4] == 0).all()
    assert forms.grad[1, 4] == 0
    assert (images.grad[0] == 0).all()
    assert images.grad[1].abs().sum() > 0


def test_a_map_and_taps_are_marked_with_their_vector() -> None:
    read = Encoded((EncoderOutput(torch.ones(2, 3, 2, 2), torch.ones(2, 3), (torch.ones(2, 1, 4, 4),)),))
    marked = mark_missing(read, torch.tensor([False, True]))
    for values in (marked.first.map, marked.first.vector, marked.first.taps[0]):
        assert values[1].isnan().all()
        assert (values[0] == 1).all()


def test_without_a_token_for_images_one_must_be_there() -> None:
    model = new_model(load_recipe("pad_ufes_20", {**TINY, "modality_dropout": {"fields": 0.5}}), 5, 3)[0].eval()
    images, forms = some_input(model)
    forms[1] = NAN
    assert model.needs_image
    assert not tiny().needs_image
    assert torch.isfinite(model(images, forms).logits).all()
    images[2] = NAN
    assert model(images, forms).logits[2].isnan().all()
