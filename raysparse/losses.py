"""Losses are sums over predicted tokens; the loop divides by the global count, so that any split of a batch adds up."""

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
