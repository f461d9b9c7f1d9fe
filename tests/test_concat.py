import pytest
import torch
from hypothesis import given as drawn
from hypothesis import strategies as st

from dualrefnet.models.concat import reduced_features
from stand_in import build, given, set_linear, set_norm


@pytest.mark.parametrize(("width", "factor", "expected"), [(81, 0.8, 324), (11, 0.8, 44), (81, 0.5, 81), (2, 0.1, 1)])
def test_the_image_has_its_share_of_the_fused_vector(width, factor, expected):
    assert reduced_features(width, factor) == expected


@drawn(width=st.integers(1, 200), factor=st.floats(0.05, 0.95))
def test_the_share_is_right_to_half_a_feature(width, factor):
    reduced = reduced_features(width, factor)
    assert reduced >= 1
    # A fused vector of n + d has (n + d) c_f image features.
    assert abs(reduced - factor * (reduced + width)) <= 0.5 * (1 - factor) + 1e-9 or reduced == 1


def test_the_factor_of_the_recipe_sets_the_widths():
    model = build("concat", features=4, metadata_width=81)
    assert (model.reducer[0].out_features, model.classifier.in_features) == (324, 405)
    model = build("concat", features=4, metadata_width=6, combination_factor=0.25)
    assert (model.reducer[0].out_features, model.classifier.in_features) == (2, 8)


def test_the_reduced_vector_stands_beside_the_form_as_it_is():
    model = build("concat", features=2, metadata_width=1, combination_factor=0.5)
    set_linear(model.reducer[0], [[1, 2]])
    set_norm(model.reducer[1], [1], sd=2)
    set_linear(model.classifier, [[1, 1], [2, 0]], [0, 1])
    # (3 + 2 - 1) / 2 = 2; the form keeps its sign.
    output = model(given([3.0, 1.0]), torch.tensor([[-7.0]]))
    torch.testing.assert_close(output.features, torch.tensor([[2.0, -7.0]]))
    torch.testing.assert_close(output.logits, torch.tensor([[-5.0, 5.0]]))
    # (-3 + 0 - 1) / 2 = -2 doesn't pass the ReLU.
    torch.testing.assert_close(model(given([-3.0, 0.0]), torch.tensor([[-7.0]])).features, torch.tensor([[0.0, -7.0]]))


def test_half_of_the_reduced_vector_is_dropped_in_training():
    model = build("concat", features=2, metadata_width=1)
    assert [layer.p for layer in model.modules() if isinstance(layer, torch.nn.Dropout)] == [0.5]
