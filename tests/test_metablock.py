import pytest
import torch

from dualrefnet.errors import RecipeError
from dualrefnet.models.encoders import BACKBONES
from dualrefnet.models.metablock import GROUP, MetaBlock
from stand_in import build, given, set_linear, set_norm


def test_the_block_gives_the_numbers_of_the_formula():
    block = MetaBlock(2, 2).eval()
    set_linear(block.scale[0], [[1, 0], [0, 2]], [0, 1])
    set_norm(block.scale[1], [1, 1], sd=2)
    set_linear(block.shift[0], [[0, 0], [0, 0]], [0.5, -0.5])
    set_norm(block.shift[1], [0, 0])
    # u = (3, -1): A u + b = (3, -1), and normalised t1 = (1, -1); t2 = (.5, -.5).
    out = block(torch.tensor([[[0.0, 1.0], [2.0, -0.5]]]), torch.tensor([[3.0, -1.0]]))
    # sigmoid(tanh(0) + .5), sigmoid(tanh(1) + .5); sigmoid(tanh(-2) - .5), sigmoid(tanh(.5) - .5)
    torch.testing.assert_close(out, torch.tensor([[[0.622459, 0.779299], [0.187852, 0.490530]]]), atol=2e-6, rtol=0)


def test_image_features_reach_the_answer_only_through_tanh_and_sigmoid():
    block = MetaBlock(1, 1).eval()
    out = block(torch.tensor([[[1e6, -1e6]]]), torch.tensor([[1.0]]))
    assert ((out > 0) & (out < 1)).all()


def test_one_pair_of_numbers_belongs_to_32_neighbours_of_the_vector():
    model = build("metablock", features=64, metadata_width=1)
    set_linear(model.block.scale[0], [[0.0], [0.0]])
    set_norm(model.block.scale[1], [0, 0])
    set_linear(model.block.shift[0], [[0.0], [1.0]])
    set_norm(model.block.shift[1], [0, 0])
    features = model(given([1.0] * 64), torch.tensor([[2.0]])).features
    # tanh(0) + (0, 2) through the sigmoid: .5 for the first 32, .880797 for the others.
    torch.testing.assert_close(features, torch.tensor([[0.5] * 32 + [0.880797] * 32]), atol=1e-6, rtol=0)


def test_every_encoder_fits_and_another_is_refused():
    assert all(spec.features % GROUP == 0 for spec in BACKBONES.values())
    with pytest.raises(RecipeError, match="groups of 32; mobilenet_v2 has 48"):
        build("metablock", features=48, metadata_width=1)
