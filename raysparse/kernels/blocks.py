"""Attention to pieces of keys in plain torch: its fused attention over blocks of queries and the keys that they see.

It is what runs where there is no native library, and for dtypes that the library does not have. Each block also gives the logarithm of its
sums of exponentials, by which two pieces are merged; in the backward pass each piece's gradients follow from the output and the
logarithm of all together (arXiv:2307.08691).
"""

from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from raysparse.kernels.spans import Piece, Rule, complete, pieces

BLOCK = 64
"""Queries in a block: fewer cost more in calls than they save, of more the scores are mostly masked."""
SHORT = 384
"""Positions in a row up to which one block with one dense mask is faster."""

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
"""What `scaled_dot_product_attention` runs on a CPU, and its gradient."""


class Block(NamedTuple):
    """Some queries of every class, by number, the keys of the class that any of them sees, and if not all do what to add to the scores."""

    queries: slice
    keys: slice
    mask: Tensor | None


def attend(query: Tensor, key: Tensor, value: Tensor, rule: Rule, scale: float) -> tuple[Tensor, Tensor]:
    """All [batch, heads, length, width] -> the output alike, and [batch, heads, length] logarithms."""
    length = query.shape[2]
    if complete(rule, length):
        return _forward(query, key, value, is_causal=True, scale=scale)
    (out, log_sum), *others = [_attend(query, key, value, piece, blocks, scale) for piece, blocks in _plan(rule, length, query.dtype)]
    for part, log_part in others:
        both = torch.logaddexp(log_sum, log_part)
        out = (out * (log_sum - both).exp().unsqueeze(-1) + part * (log_part - both).exp().unsqueeze(-1)).to(query.dtype)
        log_sum = both
    return out, log_sum


def gradients(
    out_grad: Tensor, tensors: tuple[Tensor, Tensor, Tensor], out: Tensor, log_sum: Tensor, rule: Rule, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Of the query, key and value in `tensors`, in the dtype of `log_sum`; `out` and `log_sum` are what `attend` gave."""
    length = out.shape[2]
    if complete(rule, length):
        return _backward(out_grad, *tensors, out, log_sum, 0.0, True, scale=scale)
    totals = [torch.zeros_like(tensor, dtype=log_sum.dtype) for tensor in tensors]
    for piece, blocks in _plan(rule, length, out.dtype):
        q, o, og = (_classes(tensor, piece.step) for tensor in (tensors[0], out, out_grad))
        k, v = _keys(tensors[1], piece), _keys(tensors[2], piece)
        logs = _classes(log_sum.unsqueeze(-1), piece.step, float("inf")).squeeze(-1)  # queries that pad a class weigh nothing
        sums = [torch.zeros_like(tensor, dtype=log_sum.dtype) for tensor in (q, k, v)]
        for rows, keys, mask in blocks:
            saved = (og[:, :, rows], q[:, :, rows], k[:, :, keys], v[:, :, keys], o[:, :, rows], logs[:, :, rows])
            found = _backward(*saved, 0.0, False, attn_mask=mask, scale=scale)
            for total, where, gradient in zip(sums, (rows, keys, keys), found, strict=True):
                total[:, :, where] += gradient
        places = (slice(None), *2 * (slice(piece.first, None, piece.stride if piece.step == 1 else 1),))
        for total, place, part in zip(totals, places, sums, strict=True):
            total[:, :, place] += _positions(part, piece.step, length)
    return totals[0], totals[1], totals[2]


def _attend(query: Tensor, key: Tensor, value: Tensor, piece: Piece, blocks: tuple[Block, ...], scale: float) -> tuple[Tensor, Tensor]:
    """One piece; for a query that sees nothing of it the output is 0 and the logarithm -inf."""
    length = query.shape[2]
    q, k, v = _classes(query, piece.step), _keys(key, piece), _keys(value, piece)
    out = torch.zeros_like(q)
    log_sum = q.new_full(q.shape[:3], float("-inf"), dtype=torch.promote_types(q.dtype, torch.float32))
    for rows, keys, mask in blocks:
        out[:, :, rows], log_sum[:, :, rows] = _forward(q[:, :, rows], k[:, :, keys], v[:, :, keys], attn_mask=mask, scale=scale)
    return _positions(out, piece.step, length), _positions(log_sum.unsqueeze(-1), piece.step, length).squeeze(-1)


@lru_cache(maxsize=64)
def _plan(rule: Rule, length: int, dtype: torch.dtype) -> tuple[tuple[Piece, tuple[Block, ...]], ...]:
    """Each piece in blocks; a short row is one piece in one block."""
    found = pieces(rule, length)
    if length > SHORT:
        return tuple((piece, _blocks(piece.low[:: piece.step], piece.high[:: piece.step], dtype)) for piece in found)
    rows, at = torch.arange(length)[:, None], torch.arange(length)
    seen = torch.zeros(length, length, dtype=torch.bool)
    for step, first, stride, low, high in found:
        number = at - first - rows % step
        seen |= (number % stride == 0) & (low[:, None] * stride <= number) & (number < high[:, None] * stride)
    own = rows.flatten().int()
    whole = Block(slice(0, length), slice(0, length), _mask(~seen, dtype))
    return ((Piece(1, 0, 1, torch.zeros_like(own), own + 1), (whole,)),)


def _blocks(low: Tensor, high: Tensor, dtype: torch.dtype) -> tuple[Block, ...]:
    """Without the queries that see nothing, which come first."""
    blocks, start = [], int((low >= high).sum())
    for rows in (slice(i, min(i + BLOCK, len(low))) for i in range(start, len(low), BLOCK)):
        keys = slice(int(low[rows][0]), int(high[rows][-1]))
        at = torch.arange(keys.start, keys.stop)
        blocks.append(Block(rows, keys, _mask((at < low[rows, None]) | (at >= high[rows, None]), dtype)))
    return tuple(blocks)


def _mask(unseen: Tensor, dtype: torch.dtype) -> Tensor | None:
    return torch.zeros(unseen.shape, dtype=dtype).masked_fill(unseen, float("-inf")) if bool(unseen.any()) else None


def _keys(tensor: Tensor, piece: Piece) -> Tensor:
    """The keys that a piece counts, for each class those of the class."""
    return tensor[:, :, piece.first :: piece.stride] if piece.step == 1 else _classes(tensor, piece.step)


def _classes(tensor: Tensor, step: int, padding: float = 0.0) -> Tensor:
    """[batch, heads, length, n] -> [batch, heads * step, ceil(length / step), n]: positions c, c + step ... together for each c < step."""
    if step == 1:
        return tensor
    padded = F.pad(tensor, (0, 0, 0, -tensor.shape[2] % step), value=padding)
    return padded.unflatten(2, (-1, step)).transpose(2, 3).flatten(1, 2)


def _positions(tensor: Tensor, step: int, length: int) -> Tensor:
    """What `_classes` took apart."""
    return tensor if step == 1 else tensor.unflatten(1, (-1, step)).transpose(2, 3).flatten(2, 3)[:, :, :length]
