"""What training takes away, and what a model that was trained so does with gaps."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dualrefnet.deploy.predictor import Predictor
from dualrefnet.errors import RecipeError
from dualrefnet.models.registry import check_method
from dualrefnet.recipe import ModalityDropoutSection, Recipe, load_recipe
from dualrefnet.runtime.imputer import Span
from dualrefnet.training.modality_dropout import draw_gaps
from dualrefnet.training.train import train_recipe

SPANS = [Span(0, 1, True), Span(1, 4, False), Span(4, 4, False), Span(4, 6, False)]


def forms(count: int, missing: float = 0.0, seed: int = 0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    values = generator.random((count, 6)).astype(np.float32)
    for span in SPANS:
        values[generator.random(count) < missing, span.start : span.stop] = np.nan
    return values


@settings(max_examples=40, deadline=None)
@given(
    st.builds(ModalityDropoutSection, fields=st.floats(0, 1), pattern=st.floats(0, 1), form=st.floats(0, 1), image=st.floats(0, 1)),
    st.integers(0, 50),
)
def test_fields_go_as_a_whole_and_something_is_always_left(section: ModalityDropoutSection, epoch: int) -> None:
    metadata = forms(60, 0.2)
    gaps = draw_gaps(metadata, SPANS, section, 3, epoch)
    for span in SPANS:
        columns = gaps.columns[:, span.start : span.stop]
        assert (columns == columns[:, :1]).all()
    left = (~np.isnan(metadata) & ~gaps.columns).any(axis=1)
    assert (left | ~gaps.image).all()


def test_the_shares_are_those_asked_for() -> None:
    gaps = draw_gaps(forms(40_000), SPANS, ModalityDropoutSection(fields=0.6), 0, 0)
    hidden = np.stack([gaps.columns[:, 0], gaps.columns[:, 1], gaps.columns[:, 4]], axis=1)
    assert hidden.mean() == pytest.approx(0.3, abs=0.01)
    assert not gaps.image.any()
    # Of the cases that lose fields, the share is drawn evenly: all three are hidden in 1/4 of them.
    assert hidden.all(axis=1).mean() == pytest.approx(0.6 / 4, abs=0.01)
    both = draw_gaps(forms(40_000), SPANS, ModalityDropoutSection(form=0.25, image=0.2), 0, 0)
    assert both.columns.all(axis=1).mean() == pytest.approx(0.25, abs=0.01)
    assert both.image.mean() == pytest.approx(0.2 * 0.75, abs=0.01)


def test_a_pattern_is_that_of_another_case() -> None:
    metadata = forms(1000)
    metadata[:300, 1:4] = np.nan
    gaps = draw_gaps(metadata, SPANS, ModalityDropoutSection(pattern=0.5), 0, 0)
    assert not gaps.columns[:, [0, 4, 5]].any()
    # 30 % of all cases have the gap, half of the others are offered it: what is missing becomes less telling.
    assert gaps.columns[300:, 1].mean() == pytest.approx(0.15, abs=0.04)


def test_the_same_seed_and_epoch_take_the_same_away_and_others_do_not() -> None:
    section = ModalityDropoutSection(fields=0.5, image=0.3)
    one, same, later = (draw_gaps(forms(200), SPANS, section, 1, epoch) for epoch in (0, 0, 1))
    assert (one.columns == same.columns).all()
    assert (one.image == same.image).all()
    assert (one.columns != later.columns).any()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"metadata.imputation": "neural"}, "metadata.imputation to token"),
        ({"metadata.tier": "M2"}, "M3 or M1"),
        ({"model.method": "metadata_only"}, "reads no photograph"),
        ({"model.method": "no_metadata"}, "nothing would be left"),
        ({"model.method": "no_metadata", "modality_dropout.image": 0}, "only 0 is possible"),
        ({"model.method": "metadata_only", "modality_dropout.image": 0}, "nothing but the form"),
    ],
)
def test_what_can_not_be_taken_away_is_refused(changes: dict[str, object], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        check_method(load_recipe("pad_ufes_20_gaps", changes))


@pytest.mark.parametrize("encoder", ["fine_tuned", "frozen"])
def test_a_model_trained_with_gaps_answers_without_form_or_photograph(
    encoder: str, tiny_recipe: Recipe, sample_root: Path, tmp_path: Path
) -> None:
    changes = {
        "metadata.imputation": "token",
        "modality_dropout": {"fields": 0.5, "pattern": 0.2, "form": 0.2, "image": 0.4},
        "training.encoder": encoder,
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
    assert any("without a photograph" in said for said in no_photograph.warnings)
    assert not any("imputed" in said for said in no_form.warnings)
