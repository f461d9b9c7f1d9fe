import torch
from torch import nn

from dualrefnet.models.jif_mmfa import MutualAttention
from stand_in import build, given, set_linear


def test_mutual_attention_gives_the_numbers_of_the_formula():
    attention = MutualAttention(1)
    gates = (attention.self_image, attention.self_metadata, attention.image_by_metadata, attention.metadata_by_image)
    for gate, weight in zip(gates, (1.0, 2.0, 3.0, -0.5), strict=True):
        set_linear(gate[0], [[weight]])
    # a = 2, b = -1: s_a = sigmoid(2), m_a = sigmoid(-3), s_b = sigmoid(-2), m_b = sigmoid(-1).
    # a' = 2 + 2 * .880797 * .047426, b' = -1 - .119203 * .268941.
    out = attention(torch.tensor([[2.0]]), torch.tensor([[-1.0]]))
    torch.testing.assert_close(out, torch.tensor([[2.083545, -1.032059]]), atol=1e-6, rtol=0)


def test_branches_are_those_of_the_earlier_code():
    model = build("jif_mmfa", features=2048, metadata_width=9)
    for branch, before in ((model.image_branch, 2048), (model.metadata_branch, 9)):
        linear = [layer for layer in branch if isinstance(layer, nn.Linear)]
        assert [(layer.in_features, layer.out_features) for layer in linear] == [(before, 512), (512, 128)]
        assert [type(layer) for layer in branch[:4]] == [nn.Linear, nn.BatchNorm1d, nn.SiLU, nn.Dropout]
        assert branch[3].p == 0.3


def test_individual_heads_see_one_side_and_the_joint_head_both():
    torch.manual_seed(0)
    model = build("jif_mmfa", features=4, metadata_width=3)
    vector, form = [1.0, -1.0, 2.0, 0.5], torch.tensor([[1.0, 0.0, -1.0]])
    heads = model(given(vector), form).heads
    other_form = model(given(vector), -form).heads
    other_image = model(given([-value for value in vector]), form).heads
    assert {name for name in heads if torch.equal(heads[name], other_form[name])} == {"image"}
    assert {name for name in heads if torch.equal(heads[name], other_image[name])} == {"metadata"}


def test_in_training_the_joint_head_is_the_answer_and_each_head_has_a_loss():
    torch.manual_seed(0)
    model = build("jif_mmfa", features=4, metadata_width=3)
    arguments = given([1.0, -1.0, 2.0, 0.5]), torch.tensor([[1.0, 0.0, -1.0]])
    asked = model(*arguments)
    # Only the flag: normalisation and dropout stay as they were.
    model.training = True
    trained = model(*arguments)
    assert torch.equal(trained.logits, asked.heads["joint"])
    assert set(trained.heads) == {"image", "metadata"}
