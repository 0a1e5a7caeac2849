"""Losses are sums over predicted tokens; the loop divides by the global count, so that any split of a batch adds up."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from raysparse.data.batch import IGNORED


def cross_entropy_sum(logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
    """Sum of next-token cross-entropies in nats, in float32.

    Args:
        logits: [rows, length, vocabulary].
        labels: [rows, length], already shifted; `IGNORED` positions count nothing.
        smoothing: label smoothing in [0, 1) (Szegedy et al. 2016).
    """
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED, reduction="sum", label_smoothing=smoothing)


def kl_sum(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Temperature squared times the sum over tokens of KL(teacher || student) in nats, in float32 (Hinton et al., arXiv:1503.02531).

    Args:
        student, teacher: [tokens, vocabulary] logits of the tokens that are predicted, both divided by `temperature`.
    """
    log_student, log_teacher = (F.log_softmax(logits.float() / temperature, -1) for logits in (student, teacher))
    return F.kl_div(log_student, log_teacher, reduction="sum", log_target=True) * temperature**2


def feature_norms(teacher: Sequence[Tensor], masks: Sequence[Tensor], eps: float) -> Tensor:
    """[layers] S_l + eps n_l: the squares of a teacher's features that count, summed, and eps for each. They add up over parts of a batch.

    Args:
        teacher: [rows, length, width] of each layer.
        masks: [rows, length] bool of each layer; what is False (padding) does not count, be it NaN.
    """
    found = [_counting(features, mask) for features, mask in zip(teacher, masks, strict=True)]
    return torch.stack([values.square().sum() + eps * values.numel() for values in found])


def squarehead(student: Sequence[Tensor], teacher: Sequence[Tensor], masks: Sequence[Tensor], norms: Tensor) -> Tensor:
    """sum_l mean[(h_S - h_T)^2] / (mean[h_T^2] + eps) over the layers l, means over the tokens that count and the features: SquareHead
    (Kurtic et al., arXiv:2310.06927), here of a part of a batch: sum_l E_l / (S_l + eps n_l), E_l the summed squares of the part.

    Args:
        student, teacher, masks: as `feature_norms` takes them.
        norms: `feature_norms` of the whole batch, added over its parts.
    """
    errors = []
    for mine, its, mask in zip(student, teacher, masks, strict=True):
        errors.append((_counting(mine, mask) - _counting(its, mask)).square().sum())
    return (torch.stack(errors) / norms.clamp_min(torch.finfo(norms.dtype).tiny)).sum()


def _counting(features: Tensor, mask: Tensor) -> Tensor:
    """[tokens, width] float32."""
    return features[mask].float()
