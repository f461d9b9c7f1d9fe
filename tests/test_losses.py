import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dualrefnet.models.base import Head, Output
from dualrefnet.recipe import LossSection
from dualrefnet.training.losses import ClassFrequencyPenalty, DualRefNetLoss, class_coefficients, class_weights

PAD_TRAIN = torch.tensor([486, 563, 35, 163, 128, 157])  # ACK BCC MEL NEV SCC SEK, Table 1


def test_class_weights_are_those_of_the_published_code_on_table_1() -> None:
    expected = [3.152, 2.721, 43.771, 9.399, 11.969, 9.758]
    assert class_weights(PAD_TRAIN, "inverse").tolist() == pytest.approx(expected, abs=5e-4)
    assert class_weights(torch.tensor([3, 0]), "inverse").tolist() == [1.0, 0.0]
    assert class_weights(PAD_TRAIN, "none").tolist() == [1.0] * 6


@given(counts=st.lists(st.integers(1, 5000), min_size=2, max_size=9))
def test_norms_of_the_coefficients_hold_for_any_counts(counts: list[int]) -> None:
    tensor = torch.tensor(counts)
    total, classes = sum(counts), len(counts)
    for direction in ("inverse", "constant", "proportional"):
        assert float(class_coefficients(tensor, "sum1", direction).sum()) == pytest.approx(1, rel=1e-5)
        assert float(class_coefficients(tensor, "mean1", direction).mean()) == pytest.approx(1, rel=1e-5)
    raw = class_coefficients(tensor, "raw", "inverse")
    assert torch.allclose(raw, 1 / tensor.float())
    assert torch.allclose(class_coefficients(tensor, "balanced", "inverse"), total / (classes * tensor.float()))
    for direction in ("constant", "proportional"):
        assert float(class_coefficients(tensor, "raw", direction).mean()) == pytest.approx(float(raw.mean()), rel=1e-5)


def test_penalty_of_equation_4_on_a_hand_example() -> None:
    f = torch.tensor([0.5, 2.0])
    hidden = torch.tensor([[1.0, -1.0], [2.0, 0.0], [0.0, 3.0], [-1.0, -1.0]])  # row sums 2 2 3 2
    classifier = torch.tensor([[1.0, 0.0, -1.0, 2.0], [0.0, -3.0, 1.0, 2.0]])  # row sums 4 6
    labels = torch.tensor([0, 1, 1, 1])
    of_classes = 0.5 * 4 + 2.0 * 6
    expected = {
        "constant": 1.25 * 9,
        "cyclic": 0.5 * 2 + 2 * 2 + 0.5 * 3 + 2 * 2,
        "blocks": 0.5 * 2 + 0.5 * 2 + 2 * 3 + 2 * 2,
        # Use of the units by the classes: (1, 0), (0, 3), (1, 1), (2, 2).
        "affinity": 0.5 * 2 + 2 * 2 + 1.25 * 3 + 1.25 * 2,
        "batch": (0.5 + 3 * 2) / 4 * 9,
    }
    for assignment, of_units in expected.items():
        penalty = ClassFrequencyPenalty(f, 0.3, assignment, "sum")
        assert float(penalty(hidden, classifier, labels)) == pytest.approx(0.3 * (of_units + of_classes)), assignment
    mean = ClassFrequencyPenalty(f, 0.3, "constant", "mean")
    assert float(mean(hidden, classifier, labels)) == pytest.approx(0.3 * (1.25 * 9 / 8 + of_classes / 8))


def test_total_is_the_weighted_sum_of_the_named_terms() -> None:
    torch.manual_seed(0)
    section = LossSection(classification=0.5, reconstruction=2.0, penalty=3.0)
    loss = DualRefNetLoss(section, PAD_TRAIN)
    head, logits, labels = Head(4, 8, 6, 0.0), torch.randn(5, 6), torch.tensor([0, 1, 2, 3, 5])
    rebuilt, target = torch.rand(5, 3, 8, 8), torch.rand(5, 3, 8, 8)
    terms = loss(Output(logits, logits, logits, rebuilt, {"image": logits * 2}), labels, target, head)
    assert set(terms) == {"classification", "classification_image", "reconstruction", "penalty", "total"}
    weights = class_weights(PAD_TRAIN, "inverse")[labels]
    by_hand = (weights * -logits.log_softmax(1)[torch.arange(5), labels]).sum() / weights.sum()
    assert float(terms["classification"]) == pytest.approx(float(by_hand), rel=1e-5)
    assert float(terms["reconstruction"]) == pytest.approx(float(((rebuilt - target) ** 2).mean()), rel=1e-5)
    total = (
        0.5 * (terms["classification"] + terms["classification_image"])
        + 2 * terms["reconstruction"]
        + 3 * terms["penalty"]
    )
    assert float(terms["total"].detach()) == pytest.approx(float(total.detach()), rel=1e-6)


def test_equation_5_is_summed_or_divided_by_images_or_by_weights() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(6, 6), torch.tensor([0, 2, 2, 3, 4, 5])
    each = -logits.log_softmax(1)[torch.arange(6), labels] * class_weights(PAD_TRAIN, "inverse")[labels]
    expected = {
        "sum": each.sum(),
        "batch": each.mean(),
        "weights": each.sum() / (1532 * (1 / 486 + 2 / 35 + 1 / 163 + 1 / 128 + 1 / 157)),
    }
    for reduction, value in expected.items():
        section = LossSection(classification_reduction=reduction)
        loss = DualRefNetLoss(section, PAD_TRAIN)
        terms = loss(Output(logits, logits, logits, None, {}), labels, None, None)
        assert float(terms["total"]) == pytest.approx(0.5 * float(value), rel=1e-5), reduction
        assert float(terms["classification"]) == pytest.approx(float(expected["weights"]), rel=1e-5)
        # Gradients of two processes, each with half of the batch, are averaged.
        halves = DualRefNetLoss(section, PAD_TRAIN, processes=2)
        parts = [
            halves(Output(logits[k], logits[k], logits[k], None, {}), labels[k], None, None)["total"]
            for k in (slice(3), slice(3, 6))
        ]
        if reduction != "weights":
            assert float(sum(parts)) / 2 == pytest.approx(0.5 * float(value), rel=1e-5), reduction


def test_terms_without_a_part_in_the_model_are_absent() -> None:
    logits = torch.randn(3, 6)
    terms = DualRefNetLoss(LossSection(), PAD_TRAIN)(
        Output(logits, logits, logits, None, {}), torch.tensor([0, 1, 2]), None, None
    )
    assert set(terms) == {"classification", "total"}
    no_penalty = DualRefNetLoss(LossSection(penalty_strength=0), PAD_TRAIN)
    assert "penalty" not in no_penalty(
        Output(logits, logits, logits, None, {}), torch.tensor([0, 1, 2]), None, Head(2, 2, 6, 0.0)
    )


def test_logit_adjustment_makes_the_frequencies_the_answer_of_a_model_that_knows_nothing() -> None:
    loss = DualRefNetLoss(LossSection(class_weights="logit_adjustment", penalty=0), PAD_TRAIN)
    logits = torch.zeros(1, 6)
    for label, count in enumerate(PAD_TRAIN.tolist()):
        expected = -math.log(count / int(PAD_TRAIN.sum()))
        assert float(loss.cross_entropy(logits, torch.tensor([label]))) == pytest.approx(expected, rel=1e-5)
