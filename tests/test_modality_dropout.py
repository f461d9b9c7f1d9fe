"""What training takes away, and what a model that was trained so does with gaps."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dualrefnet.deploy.predictor import Predictor
from dualrefnet.errors import RecipeError
from dualrefnet.models.base import Output
from dualrefnet.models.registry import new_model
from dualrefnet.recipe import ModalityDropoutSection, Recipe, load_recipe
from dualrefnet.runtime.metadata import Span
from dualrefnet.training.losses import DualRefNetLoss
from dualrefnet.training.modality_dropout import ModalityViews, draw_missing
from dualrefnet.training.train import train_recipe

TINY = {"model.weights": "none", "model.backbone": "mobilenet_v2", "image.size": 32}
SPANS = [Span(0, 1, True), Span(1, 4, False), Span(4, 4, False), Span(4, 6, False)]


def forms(count: int, missing: float = 0.0, seed: int = 0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    values = generator.random((count, 6)).astype(np.float32)
    for span in SPANS:
        values[generator.random(count) < missing, span.start : span.stop] = np.nan
    return values


@settings(max_examples=40)
@given(st.builds(ModalityDropoutSection, fields=st.floats(0, 1), pattern=st.floats(0, 1)), st.integers(0, 50))
def test_fields_go_as_a_whole(section: ModalityDropoutSection, epoch: int) -> None:
    hidden = draw_missing(forms(60, 0.2), SPANS, section, 3, epoch)
    for span in SPANS:
        columns = hidden[:, span.start : span.stop]
        assert (columns == columns[:, :1]).all()


def test_the_shares_are_those_asked_for() -> None:
    columns = draw_missing(forms(40_000), SPANS, ModalityDropoutSection(fields=0.6), 0, 0)
    hidden = np.stack([columns[:, 0], columns[:, 1], columns[:, 4]], axis=1)
    assert hidden.mean() == pytest.approx(0.3, abs=0.01)
    # Of the cases that lose fields, the share is drawn evenly: all three are hidden in 1/4 of them.
    assert hidden.all(axis=1).mean() == pytest.approx(0.6 / 4, abs=0.01)


def test_a_pattern_is_that_of_another_case() -> None:
    metadata = forms(1000)
    metadata[:300, 1:4] = np.nan
    columns = draw_missing(metadata, SPANS, ModalityDropoutSection(pattern=0.5), 0, 0)
    assert not columns[:, [0, 4, 5]].any()
    # 30 % of all cases have the gap, half of the others are offered it: what is missing becomes less telling.
    assert columns[300:, 1].mean() == pytest.approx(0.15, abs=0.04)


@pytest.mark.parametrize(
    "changes", [{"metadata.imputation": "neural"}, {"modality_dropout": {"metadata": 0.5, "image": 0.5}}]
)
def test_what_can_not_be_taken_away_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises(RecipeError, match=r"imputation token|stay below 1"):
        load_recipe("pad_ufes_20", changes)


def test_single_modalities_are_answered_as_if_the_other_had_never_been_there() -> None:
    torch.manual_seed(0)
    model = new_model(load_recipe("pad_ufes_20", TINY), 6, 3)[0].eval()
    images, metadata = torch.rand(4, 3, 32, 32), torch.rand(4, 6)
    both, single = ModalityViews(model, ["image_only", "metadata_only"])(images, metadata)
    nothing = torch.full_like(metadata, torch.nan)
    assert torch.allclose(both.logits, model(images, metadata).logits, atol=1e-6)
    assert torch.allclose(single["image_only"].logits, model(images, nothing).logits, atol=1e-6)
    assert torch.allclose(
        single["metadata_only"].logits, model(torch.full_like(images, torch.nan), metadata).logits, atol=1e-6
    )
    assert both.reconstruction is None
    rebuilt, alone = ModalityViews(model.train(), ["image_only"])(images, metadata)
    assert rebuilt.reconstruction.shape == (4, 3, 64, 64)
    assert alone["image_only"].reconstruction is None


def test_the_loss_is_the_mean_over_what_would_have_been_dropped() -> None:
    generator = torch.Generator().manual_seed(0)
    outputs = [
        Output(torch.randn(5, 3, generator=generator), torch.zeros(5, 2), torch.zeros(5, 2), None, {}) for _ in range(3)
    ]
    labels = torch.tensor([0, 1, 2, 1, 0])
    section = load_recipe("pad_ufes_20", {"loss.classification": 2.0}).loss
    counts = torch.tensor([5.0, 3.0, 2.0])
    loss = DualRefNetLoss(section, counts, {"image_only": 0.3, "metadata_only": 0.2})
    terms = loss(outputs[0], labels, None, None, {"image_only": outputs[1], "metadata_only": outputs[2]})
    parts = [float(loss.cross_entropy(output.logits, labels)) for output in outputs]
    assert float(terms["total"]) == pytest.approx(2 * (0.5 * parts[0] + 0.3 * parts[1] + 0.2 * parts[2]), rel=1e-6)
    assert float(terms["classification_image_only"]) == pytest.approx(parts[1], rel=1e-6)
    assert float(DualRefNetLoss(section, counts)(outputs[0], labels, None, None)["total"]) == pytest.approx(
        2 * parts[0], rel=1e-6
    )


@pytest.mark.parametrize("encoder", ["fine_tuned", "frozen"])
def test_a_model_trained_with_gaps_answers_without_form_or_photograph(
    encoder: str, tiny_recipe: Recipe, sample_root: Path, tmp_path: Path
) -> None:
    changes = {
        "metadata.imputation": "token",
        "modality_dropout": {"fields": 0.5, "pattern": 0.2, "metadata": 0.2, "image": 0.4},
        "training.encoder": encoder,
        "training.epochs": 1,
    }
    run = train_recipe(load_recipe(tiny_recipe, changes), tmp_path / "run")
    predictor = Predictor.load(run)
    photograph = next((sample_root / "images").rglob("*.png"))
    whole = predictor.predict(photograph, {"age": 61, "region": "FACE"})
    no_form = predictor.predict(photograph, {})
    no_photograph = predictor.predict(None, {"age": 61, "region": "FACE"})
    answers = [tuple(answer.probabilities.values()) for answer in (whole, no_form, no_photograph)]
    assert len(set(answers)) == 3
    assert np.isfinite(answers).all()
    assert any("learned token" in said for said in no_form.warnings)
    assert any("without an image" in said for said in no_photograph.warnings)
    assert not any("imputed" in said for said in no_form.warnings)
