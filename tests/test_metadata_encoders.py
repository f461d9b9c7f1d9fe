import pytest
import torch
from torch import nn

from dualrefnet.models.components import ColumnAttention, MetadataTransformer, create_metadata_network, metadata_mlp
from stand_in import set_linear


def test_the_metadata_network_has_four_layers_and_no_last_relu():
    network = metadata_mlp(73, (64, 128, 256, 512))
    assert [layer.out_features for layer in network if isinstance(layer, nn.Linear)] == [64, 128, 256, 512]
    assert [type(layer) for layer in network] == [nn.Linear, nn.ReLU] * 3 + [nn.Linear]
    assert (network(torch.randn(64, 73)) < 0).any()


@pytest.mark.parametrize("kind", ["mlp", "attention", "transformer"])
def test_every_kind_makes_the_last_width_of_a_form(kind):
    assert create_metadata_network(kind, 5, (8, 16)).eval()(torch.randn(3, 5)).shape == (3, 16)


def test_another_kind_is_refused_with_those_there_are():
    with pytest.raises(ValueError, match="'lstm'; there are: mlp, attention, transformer"):
        create_metadata_network("lstm", 5, (8,))


def test_column_attention_gives_the_numbers_of_the_formula():
    attention = ColumnAttention(2)
    set_linear(attention.weights[0], [[1, 0], [0, 1]])
    set_linear(attention.weights[2], [[1, 0], [1, 3]], [0, 1])
    # relu(2, -1) = (2, 0); sigmoid(2) = .880797 and sigmoid(2 + 1) = .952574, so the second column's weight is the
    # first's doing.
    torch.testing.assert_close(attention(torch.tensor([[2.0, -1.0]])), torch.tensor([[1.761594, -0.952574]]))


def test_the_attention_stands_before_the_four_layers():
    attention, layers = create_metadata_network("attention", 73, (64, 128, 256, 512))
    assert isinstance(attention, ColumnAttention)
    assert [layer.out_features for layer in layers if isinstance(layer, nn.Linear)] == [64, 128, 256, 512]


def test_a_token_is_its_columns_value_in_its_direction_at_its_place():
    network = MetadataTransformer(2, 3).eval()
    with torch.no_grad():
        network.directions.copy_(torch.stack([torch.full((64,), 1.0), torch.full((64,), 10.0)]))
        network.places.copy_(torch.stack([torch.full((64,), 0.25), torch.full((64,), 0.5)]))
        network.gatherer.fill_(7.0)
    seen = []
    network.layers.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    network(torch.tensor([[2.0, -1.0]]))
    assert seen[0].shape == (1, 3, 64)
    torch.testing.assert_close(seen[0][0, :, 5], torch.tensor([7.0, 2.25, -9.5]))


def test_the_transformer_tells_columns_and_values_apart_and_rows_dont_mix():
    torch.manual_seed(0)
    network = MetadataTransformer(4, 6).eval()
    form = torch.tensor([[1.0, 0.0, -1.0, 2.0]])
    with torch.no_grad():
        answer = network(form)
        for other in (form[:, [1, 0, 2, 3]], torch.tensor([[1.0, 0.0, -1.0, 1.0]]), torch.zeros(1, 4)):
            assert not torch.allclose(network(other), answer, atol=1e-3)
        torch.testing.assert_close(network(torch.cat([form, 9 * form]))[:1], answer)
