import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dualrefnet.models.components import DecisionFusion


def logits_of(probabilities: list[list[list[float]]]) -> torch.Tensor:
    return torch.tensor(probabilities).log()


def test_the_answer_is_the_weighted_mean_of_the_probabilities():
    fusion = DecisionFusion(("a", "b"))
    fusion.weights.copy_(torch.tensor([0.75, 0.25]))
    # Logits are known up to a constant: softmax(ln p + 3) = p.
    logits = logits_of([[[0.2, 0.8]], [[0.6, 0.4]]]) + torch.tensor([3.0, -5.0])[:, None, None]
    torch.testing.assert_close(fusion(logits), torch.tensor([[math.log(0.3), math.log(0.7)]]))


def test_a_head_without_weight_says_nothing_and_breaks_nothing():
    fusion = DecisionFusion(("a", "b", "c"))
    fusion.weights.copy_(torch.tensor([0.0, 1.0, 0.0]))
    logits = torch.tensor([[[1e4, -1e4]], [[0.0, math.log(3)]], [[-1e4, 1e4]]])
    torch.testing.assert_close(fusion(logits), torch.tensor([[math.log(0.25), math.log(0.75)]]))


def test_half_precision_is_mixed_in_single():
    assert DecisionFusion(("a", "b"))(torch.zeros(2, 1, 3, dtype=torch.bfloat16)).dtype == torch.float32


def test_the_planted_best_head_gets_all_the_weight():
    # The second head is barely right, the others are wrong without a doubt: any share of theirs spoils the answer.
    labels = torch.tensor([0, 1, 1])
    right = [[0.51, 0.49], [0.49, 0.51], [0.49, 0.51]]
    wrong = [[0.01, 0.99], [0.99, 0.01], [0.99, 0.01]]
    fusion = DecisionFusion(("a", "b", "c"))
    fusion.choose(logits_of([wrong, right, wrong]), labels)
    torch.testing.assert_close(fusion.weights, torch.tensor([0.0, 1.0, 0.0]))


@pytest.mark.parametrize("heads", [1, 2, 3, 4])
def test_of_equals_the_even_mean_is_chosen(heads):
    fusion = DecisionFusion(tuple("abcd"[:heads]))
    fusion.weights.zero_()
    fusion.choose(logits_of([[[0.9, 0.1], [0.6, 0.4]]] * heads), torch.tensor([0, 1]))
    torch.testing.assert_close(fusion.weights, torch.full((heads,), 1 / heads))


def test_the_choice_is_by_balanced_accuracy_and_absent_classes_dont_count():
    labels = torch.tensor([0] * 8 + [1] * 2)
    # The first head takes two of the eight for class 2, of which there is none: recalls 6/8 and 1, balanced 7/8, 8 of
    # 10 right.
    # The second misses one of the two: recalls 1 and 1/2, balanced 3/4, but 9 of 10 right.
    balanced = [2, 2, 0, 0, 0, 0, 0, 0, 1, 1]
    accurate = [0, 0, 0, 0, 0, 0, 0, 0, 1, 0]
    # Where they differ, the mean follows the heavier one, and of equals the first, which is a little surer.
    logits = torch.stack([certainty * torch.eye(3)[heads] for heads, certainty in ((balanced, 4.0), (accurate, 3.9))])
    fusion = DecisionFusion(("balanced", "accurate"))
    fusion.choose(logits, labels)
    assert fusion(logits).argmax(dim=1).tolist() == balanced
    torch.testing.assert_close(fusion.weights, torch.tensor([0.5, 0.5]))


def test_a_mean_may_be_better_than_every_head():
    # One head is sure of the first image and barely wrong about the second, the other the other way round.
    fusion = DecisionFusion(("a", "b"))
    logits = logits_of([[[0.9, 0.1], [0.6, 0.4]], [[0.4, 0.6], [0.1, 0.9]]])
    fusion.choose(logits, torch.tensor([0, 1]))
    assert fusion(logits).argmax(dim=1).tolist() == [0, 1]


def test_weights_travel_with_the_parameters():
    fusion, other = DecisionFusion(("a", "b")), DecisionFusion(("a", "b"))
    fusion.weights.copy_(torch.tensor([0.25, 0.75]))
    other.load_state_dict(fusion.state_dict())
    assert torch.equal(other.weights, torch.tensor([0.25, 0.75]))


@settings(max_examples=25, deadline=None)
@given(heads=st.integers(1, 3), images=st.integers(1, 12), classes=st.integers(2, 4), seed=st.integers(0, 2**31 - 1))
def test_chosen_weights_are_a_mean_and_no_worse_than_the_best_head(heads, images, classes, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(heads, images, classes, generator=generator)
    labels = torch.randint(classes, (images,), generator=generator)
    fusion = DecisionFusion(tuple("abcd"[:heads]))
    fusion.choose(logits, labels)
    assert float(fusion.weights.sum()) == pytest.approx(1, abs=1e-6)
    assert (fusion.weights >= 0).all()

    def balanced(predicted):
        return torch.stack([(predicted[labels == label] == label).double().mean() for label in labels.unique()]).mean()

    best = max(float(balanced(head.argmax(dim=1))) for head in logits)
    assert float(balanced(fusion(logits).argmax(dim=1))) >= best - 1e-9
    torch.testing.assert_close(fusion(logits).exp().sum(dim=1), torch.ones(images))
