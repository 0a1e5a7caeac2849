"""Which keys a query sees, as kernels take them: pieces, each a run of evenly spaced keys for every query.

The rule is that of `raysparse.sparsity.attention.Rule`. Whatever of it is near or in the query's block is one span of keys that ends at the
query; strided keys and summary columns before the span are a second piece.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from raysparse.kernels.library import check

Rule = tuple[int, int, int, int]
"""Width, stride, block and column. Query q sees key k <= q where ``q - k < width``, ``(q - k) mod stride = 0``,
``floor(q / block) = floor(k / block)`` or ``k mod column = column - 1``; width 1 and block 1 say nothing, nor do a stride and a column as
long as the row."""


class Piece(NamedTuple):
    """Class c < step has the queries c, c + step, c + 2 step ...; query q of it sees the keys ``first + c + j * stride`` with
    ``low[q] <= j < high[q]``. Within a class neither bound ever falls, and the i-th queries of all classes have the same bounds.

    Attributes:
        low, high: [length] int32.
    """

    step: int
    first: int
    stride: int
    low: Tensor
    high: Tensor


@lru_cache(maxsize=64)
def pieces(rule: Rule, length: int) -> tuple[Piece, ...]:
    """No two show a query the same key; the first shows every query at least one, its own.

    A piece that shows nobody anything is left out, and where every key is seen there is one piece.
    """
    width, stride, block, column = rule
    check(min(*rule, length) >= 1, f"{rule} {length}")
    check(stride >= length or (block == 1 and column >= length), "strided keys go with near ones alone:", rule)
    at = torch.arange(length)
    start = torch.minimum(at - width + 1, at // block * block).clamp(min=0)  # of the span
    none, strided_alone = torch.zeros_like(at), width == 1 and stride < length
    found = [] if strided_alone else [Piece(1, 0, 1, start, at + 1)]
    if stride < length:
        end = at + 1 if strided_alone else start  # the class's positions below it
        found.append(Piece(stride, 0, stride, none, (end - at % stride + stride - 1).clamp(min=0) // stride))
    elif column < length:
        found.append(Piece(1, column - 1, column, none, start // column))
    if sum(int((piece.high - piece.low).sum()) for piece in found) == length * (length + 1) // 2:
        found = [Piece(1, 0, 1, none, at + 1)]
    return tuple(piece._replace(low=piece.low.int(), high=piece.high.int()) for piece in found if bool((piece.low < piece.high).any()))


def complete(rule: Rule, length: int) -> bool:
    """Whether every query sees every key up to its own: full causal attention."""
    first = pieces(rule, length)[0]
    return first.stride == 1 and not bool(first.low.any())
