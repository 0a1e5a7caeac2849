"""Losses on tensors small enough to work out by hand."""

import math

import pytest
import torch

from raysparse.data.batch import IGNORED, Batch
from raysparse.losses import feature_norms, kl_sum, squarehead

PADDING = [7.0, 7.0]
TEACHER = [torch.tensor([[[1.0, 2.0], [3.0, 0.0]], [[0.0, 2.0], PADDING]]), torch.tensor([[[2.0, 0.0], [0.0, 0.0]], [[0.0, 2.0], PADDING]])]
STUDENT = [torch.tensor([[[2.0, 2.0], [3.0, 1.0]], [[0.0, 0.0], PADDING]]), torch.tensor([[[2.0, 2.0], [0.0, 0.0]], [[0.0, 2.0], PADDING]])]
MASK = torch.tensor([[True, True], [True, False]])
# Layer 0: squared errors 1 + 1 + 4 = 6, the teacher's squares 5 + 9 + 4 = 18. Layer 1: 4 and 8. 6 elements count in each.


def loss(student, teacher, masks, eps):
    return squarehead(student, teacher, masks, feature_norms(teacher, masks, eps))


@pytest.mark.parametrize("eps", [2**-7, 1e-8, 1.0])
def test_squarehead_by_hand(eps):
    """A sum over layers of mean[(s - t)^2] / (mean[t^2] + eps)."""
    expected = (6 / 6) / (18 / 6 + eps) + (4 / 6) / (8 / 6 + eps)
    assert float(loss(STUDENT, TEACHER, [MASK] * 2, eps)) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("garbage", [1e30, math.inf, math.nan])
def test_padding_moves_neither_the_loss_nor_a_gradient(garbage):
    student, teacher = ([features.clone() for features in found] for found in (STUDENT, TEACHER))
    for features in (*student, *teacher):
        features[1, 1] = garbage
    student = [features.requires_grad_() for features in student]
    dirty = loss(student, teacher, [MASK] * 2, 1e-3)
    dirty.backward()
    assert dirty.item() == float(loss(STUDENT, TEACHER, [MASK] * 2, 1e-3))
    for features in student:
        assert not features.grad[1, 1].any()
        assert features.grad.isfinite().all()


def test_squarehead_is_relative_but_for_eps():
    scaled = [[10 * features for features in found] for found in (STUDENT, TEACHER)]
    assert float(loss(*scaled, [MASK] * 2, 1e-9)) == pytest.approx(float(loss(STUDENT, TEACHER, [MASK] * 2, 1e-9)), rel=1e-6)
    assert float(loss(*scaled, [MASK] * 2, 1.0)) != pytest.approx(float(loss(STUDENT, TEACHER, [MASK] * 2, 1.0)), rel=1e-2)


def test_layers_may_count_different_tokens():
    """An encoder's and a decoder's."""
    other = torch.tensor([[True, False], [False, False]])
    expected = (6 / 6) / (18 / 6 + 0.5) + (4 / 2) / (4 / 2 + 0.5)
    assert float(loss(STUDENT, TEACHER, [MASK, other], 0.5)) == pytest.approx(expected)


def test_parts_of_a_batch_add_up():
    norms = sum(feature_norms([t[i : i + 1] for t in TEACHER], [MASK[i : i + 1]] * 2, 0.1) for i in range(2))
    parts = [squarehead([s[i : i + 1] for s in STUDENT], [t[i : i + 1] for t in TEACHER], [MASK[i : i + 1]] * 2, norms) for i in range(2)]
    assert float(sum(parts)) == pytest.approx(float(loss(STUDENT, TEACHER, [MASK] * 2, 0.1)), rel=1e-6)


def test_a_batch_in_which_nothing_counts_costs_nothing():
    nothing = [torch.zeros_like(MASK)] * 2
    assert float(loss(STUDENT, TEACHER, nothing, 0.1)) == 0.0


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_kl_by_hand(temperature):
    """The teacher is the target: sum_v p_T (log p_T - log p_S), times the squared temperature."""
    student, teacher = torch.tensor([[0.0, 0.0, 0.0], [1.0, 0.0, 0.0]]), torch.tensor([[math.log(2.0), 0.0, 0.0], [1.0, 0.0, 0.0]])
    weights = [2 ** (1 / temperature), 1.0, 1.0]
    shares = [weight / sum(weights) for weight in weights]
    expected = temperature**2 * sum(share * math.log(3 * share) for share in shares)  # the second token's are equal
    assert float(kl_sum(student, teacher, temperature)) == pytest.approx(expected, rel=1e-5)
    assert float(kl_sum(student, teacher, temperature)) != pytest.approx(float(kl_sum(teacher, student, temperature)), rel=1e-3)


def test_tokens_of_a_batch_end_with_the_last_that_predicts():
    labels = torch.tensor([[IGNORED, 5, 6, IGNORED], [IGNORED] * 4, [IGNORED, IGNORED, IGNORED, 2]])
    expected = [[True, True, True, False], [False] * 4, [True] * 4]
    assert Batch(torch.zeros_like(labels), labels).tokens.tolist() == expected
