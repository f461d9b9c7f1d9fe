import pytest
import torch

from dualrefnet.models.components import ATTENTION_WIDTH, create_fusion
from dualrefnet.models.encoders import EncoderOutput
from stand_in import set_linear


def test_concatenation_puts_the_form_after_the_image():
    fusion = create_fusion("concat", 2, 1)
    assert fusion.features == 3
    fused = fusion(EncoderOutput(None, torch.tensor([[1.0, 2.0]])), torch.tensor([[3.0]]))
    torch.testing.assert_close(fused, torch.tensor([[1.0, 2.0, 3.0]]))


def test_hadamard_multiplies_the_projected_image():
    fusion = create_fusion("hadamard", 3, 2)
    assert fusion.features == 2
    set_linear(fusion.projection, [[1, 0, 1], [0, 2, 0]], [0, 1])
    # (1 + 3, 2 * 2 + 1) times (10, -1).
    fused = fusion(EncoderOutput(None, torch.tensor([[1.0, 2.0, 3.0]])), torch.tensor([[10.0, -1.0]]))
    torch.testing.assert_close(fused, torch.tensor([[40.0, -5.0]]))


def test_cross_attention_without_preference_is_the_mean_of_vector_and_places():
    fusion = create_fusion("cross_attention", 1, 1)
    assert fusion.features == 1024
    set_linear(fusion.places, [[1.0]] * ATTENTION_WIDTH)
    set_linear(fusion.question, [[2.0]] * ATTENTION_WIDTH)
    identity = torch.eye(ATTENTION_WIDTH)
    with torch.no_grad():
        # No question: all scores are zero. Values and answer pass as they are.
        fusion.attention.in_proj_weight.copy_(torch.cat([0 * identity, identity, identity]))
        fusion.attention.in_proj_bias.zero_()
        fusion.attention.out_proj.weight.copy_(identity)
        fusion.attention.out_proj.bias.zero_()
    encoded = EncoderOutput(torch.tensor([[[[0.0, 1.0], [2.0, 3.0]]]]), torch.tensor([[4.0]]))
    fused = fusion(encoded, torch.tensor([[5.0]]))
    torch.testing.assert_close(fused, torch.tensor([[2.0] * ATTENTION_WIDTH + [10.0] * ATTENTION_WIDTH]))


def test_cross_attention_has_no_order_of_places_but_an_eye_for_them():
    torch.manual_seed(0)
    fusion = create_fusion("cross_attention", 6, 3).eval()
    places, vector, form = torch.randn(2, 6, 4), torch.randn(2, 6), torch.randn(2, 3)

    def fuse(places, form):
        return fusion(EncoderOutput(places.unflatten(2, (2, 2)), vector), form)

    with torch.no_grad():
        before = fuse(places, form)
        torch.testing.assert_close(fuse(places[:, :, [2, 0, 3, 1]], form), before)
        changed = places.clone()
        changed[:, :, 1] += 1
        assert not torch.allclose(fuse(changed, form)[:, :ATTENTION_WIDTH], before[:, :ATTENTION_WIDTH])
        # Another question gets another answer.
        assert not torch.allclose(fuse(places, -form)[:, :ATTENTION_WIDTH], before[:, :ATTENTION_WIDTH])
    assert fusion.attention.num_heads == 4


def test_another_fusion_is_refused_with_those_there_are():
    with pytest.raises(ValueError, match="'sum'; there are: concat, hadamard, cross_attention"):
        create_fusion("sum", 2, 2)
