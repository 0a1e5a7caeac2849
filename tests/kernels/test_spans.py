"""Pieces of keys against the patterns that they stand for."""

from itertools import product

import pytest
import torch

from raysparse.kernels.spans import Rule as Numbers
from raysparse.kernels.spans import complete, pieces
from raysparse.sparsity.attention import Fixed, Full, Local, LocalOrStrided, Rule, Strided
from tests.sparsity.test_attention import PATTERNS


def shown(rule: Numbers, length: int) -> list[list[int]]:
    """Keys of each query, as the pieces list them."""
    keys: list[list[int]] = [[] for _ in range(length)]
    for step, first, stride, low, high in pieces(rule, length):
        for q in range(length):
            keys[q] += [first + q % step + j * stride for j in range(low[q], high[q])]
    return keys


@pytest.mark.parametrize("pattern", [*PATTERNS, Local(width=24), LocalOrStrided(width=24, stride=23), Strided(stride=23)], ids=str)
@pytest.mark.parametrize("length", [1, 2, 23, 24, 101])
def test_pieces_show_the_pattern(pattern, length):
    at = torch.arange(length)
    allowed = [row.nonzero().flatten().tolist() for row in pattern.allows(at[:, None], at)]
    keys = shown(pattern.rule, length)
    assert [sorted(of_query) for of_query in keys] == allowed  # none twice: sorted lists, not sets
    assert complete(pattern.rule, length) == (pattern.num_pairs(length) == Full().num_pairs(length))
    found = pieces(pattern.rule, length)
    assert bool((found[0].low < found[0].high).all())  # the first shows every query a key
    for piece in found:
        assert piece.low.dtype == piece.high.dtype == torch.int32
        for bound, c in product((piece.low, piece.high), range(min(piece.step, length))):
            assert bool((bound[c :: piece.step].diff() >= 0).all())  # neither bound falls within a class
            assert bound[c :: piece.step].equal(bound[:: piece.step][: len(bound[c :: piece.step])])  # nor differs between classes


def test_pieces_are_as_few_as_can_be():
    number = {pattern: len(pieces(pattern.rule, 100)) for pattern in PATTERNS}
    assert {type(pattern).__name__: count for pattern, count in number.items() if count == 2}.keys() == {"LocalOrStrided", "Fixed"}
    assert [len(pieces(pattern.rule, 8)) for pattern in (Fixed(width=8), Fixed(width=7), LocalOrStrided(width=2, stride=8))] == [1, 2, 1]
    assert [pieces(Strided(stride=stride).rule, 8)[0].step for stride in (7, 8)] == [7, 1]  # a stride as long as the row is the query alone


def test_summary_columns_may_go_with_near_keys():
    near_and_columns = Rule(width=5, column=4)
    at = torch.arange(23)
    allowed = [row.nonzero().flatten().tolist() for row in near_and_columns.allows(at[:, None], at)]
    assert [sorted(keys) for keys in shown(near_and_columns, 23)] == allowed


@pytest.mark.parametrize("rule", [Rule(stride=4, block=3), Rule(stride=4, column=4), Rule(width=0)])
def test_rules_that_no_pattern_has(rule):
    with pytest.raises(ValueError, match=r"\d"):
        pieces(rule, 12)
