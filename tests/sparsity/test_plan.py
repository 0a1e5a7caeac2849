"""Whole numbers of live weights: the documented rule, to the last weight."""

from fractions import Fraction
from itertools import product
from math import ceil, floor, prod

import pytest

from raysparse.config import ConfigError
from raysparse.sparsity.distribution import ER, ERK, Shape, Uniform
from raysparse.sparsity.plan import SparsityConfig, SparsityPlan, share_out

KINDS = [Uniform(), ER(), ERK()]


def plan(shapes, **config):
    return SparsityPlan.build(shapes, SparsityConfig.check(config))


def vectors(*sizes):
    """One layer [1, n] for each size."""
    return {chr(ord("a") + i): (1, n) for i, n in enumerate(sizes)}


@pytest.mark.parametrize(
    ("shape", "target", "nnz"),
    [
        # float32 arithmetic gives 235,928 or another neighbour for some of these
        ((768, 3072), 0.9, 235_930),  # 235,929.6
        ((768, 3072), 0.7, 707_789),  # 707,788.8
        ((50_304, 768), 0.9, 3_863_347),  # 3,863,347.2
        ((50_304, 768), 0.7, 11_590_042),  # 11,590,041.6
        ((32_768, 8_192), 0.9, 26_843_546),  # 26,843,545.6
        ((32_768, 8_192), 0.7, 80_530_637),  # 80,530,636.8
        ((10, 10), 0.1, 90),
        ((10, 10), 0.29, 71),  # 1 - 0.29 is 0.71 only in decimals
        ((1, 5), 0.5, 3),  # halves up
        ((1, 5), 0.9, 1),  # 0.5, up
        ((1, 1), 0.5, 1),
        ((4, 4), 0.0, 16),
    ],
)
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.type)
def test_one_layer(kind, shape, target, nnz):
    found = plan({"w": shape}, target=target, distribution={"type": kind.type})
    assert found.nnz == {"w": nnz}
    assert (found.total, found.size) == (nnz, prod(shape))
    assert found.sparsity == 1 - nnz / prod(shape)


@pytest.mark.parametrize(
    ("sizes", "target", "nnz"),
    [
        ([10, 10, 10], 0.5, [5, 5, 5]),
        ([7, 7], 0.5, [4, 3]),  # 3.5 and 3.5: a tie goes to the first
        ([7, 8], 0.5, [4, 4]),  # total 7.5, up: shares 3.73 and 4.27
        ([9, 58, 33], 0.9, [1, 6, 3]),  # 0.9, 5.8, 3.3: the two missing ones go to a and b
        ([58, 9, 33], 0.9, [6, 1, 3]),
        ([3, 58, 39], 0.9, [1, 5, 4]),  # 0.3, 5.8, 3.9 -> 0, 6, 4; a is empty and takes one of b
        ([3, 3, 94], 0.9, [1, 1, 8]),  # 0.3, 0.3, 9.4 -> 0, 0, 10 -> two of c
        ([5, 50, 50, 1], 0.9, [1, 4, 5, 1]),  # total 10.6: 11 -> 0.52, 5.19, 5.19, 0.10 -> 1, 5, 5, 0 -> d takes one of b
    ],
)
def test_drawn_shares(sizes, target, nnz):
    assert list(plan(vectors(*sizes), target=target).nnz.values()) == nnz


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.type)
def test_the_rule_on_every_small_model(kind):
    """Totals exact, no layer empty or over-full, and largest remainders where no layer had to be raised to 1."""
    shapes_of = [(1, 1), (1, 3), (2, 2), (3, 5), (1, 12)]
    cases = 0
    for model in product(shapes_of, repeat=3):
        shapes: dict[str, Shape] = dict(zip("abc", model, strict=True))
        size = sum(map(prod, model))
        for percent in range(0, 100, 3):
            total = floor(Fraction(100 - percent, 100) * size + Fraction(1, 2))
            config = SparsityConfig(target=percent / 100, distribution=kind)
            if total < 3:
                with pytest.raises(ConfigError):
                    SparsityPlan.build(shapes, config)
                continue
            cases += 1
            found = SparsityPlan.build(shapes, config)
            assert list(found.nnz) == list(found.shapes) == list(shapes)
            assert found.total == total
            assert all(1 <= found.nnz[name] <= prod(shapes[name]) for name in shapes)
            exact = water_level(shapes, total, kind)
            if all(exact[name] >= 1 for name in shapes):
                assert found.nnz == largest_remainders(exact, total)
    assert cases > 3000


def water_level(shapes, total, kind):
    """min(n, eps * share), by trying every set of dense layers: the right one is consistent with its own eps."""
    for dense in product([False, True], repeat=len(shapes)):
        full = [name for name, flag in zip(shapes, dense, strict=True) if flag]
        rest = [name for name in shapes if name not in full]
        budget = total - sum(prod(shapes[name]) for name in full)
        eps = Fraction(budget, sum(kind.share(shapes[name]) for name in rest)) if rest else Fraction(0)
        fits = budget == 0 if not rest else all(0 <= eps * kind.share(shapes[name]) <= prod(shapes[name]) for name in rest)
        above = not rest or all(eps * kind.share(shapes[name]) >= prod(shapes[name]) for name in full)
        if fits and above:
            return {
                name: Fraction(prod(shapes[name])) if name in full or eps is None else eps * kind.share(shapes[name]) for name in shapes
            }
    raise AssertionError("no level")


def largest_remainders(exact, total):
    names = list(exact)
    ranked = sorted(range(len(names)), key=lambda i: (floor(exact[names[i]]) - exact[names[i]], i))
    extra = set(ranked[: total - sum(map(floor, exact.values()))])
    return {name: floor(exact[name]) + (i in extra) for i, name in enumerate(names)}


def test_saturated_layers_are_dense_and_the_others_take_up_the_rest():
    shapes = {"small": (2, 2), "large": (40, 40)}
    # ER shares 4 : 80 of 804 give the small layer 38 of its 4 weights.
    found = plan(shapes, target=0.5, distribution={"type": "er"})
    assert found.nnz == {"small": 4, "large": 798}
    # One after the other: with a dense, b is over-full too.
    chain = {"a": (1, 2), "b": (3, 3), "c": (30, 30)}
    assert plan(chain, target=0.1, distribution={"type": "er"}).nnz == {"a": 2, "b": 9, "c": 809}


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.type)
def test_three_weights_at_nine_tenths(kind):
    """0.3 of a weight is none; a layer never starves for a rounding."""
    assert plan({"tiny": (1, 3), "big": (100, 100)}, target=0.9, distribution={"type": kind.type}).nnz["tiny"] >= 1
    assert plan({"tiny": (1, 3), "big": (100, 100)}, target=0.9).nnz == {"tiny": 1, "big": 999}


def test_own_levels():
    shapes = {"h.0.attn": (10, 10), "h.0.mlp": (10, 20), "h.1.attn": (10, 10), "h.1.mlp": (10, 20)}
    found = plan(shapes, target=0.75, layers={"h.0.*": 0.0, "h.0.mlp": 1.0, "*.1.attn": 0.999})
    #                 dense         emptied      0.1 is none: 1     the target holds for what is left
    assert found.nnz == {"h.0.attn": 100, "h.0.mlp": 0, "h.1.attn": 1, "h.1.mlp": 50}
    assert list(found.nnz) == list(shapes)
    assert found.total == 151
    assert plan(shapes, target=0.5, layers={"*": 0.25}).nnz == {"h.0.attn": 75, "h.0.mlp": 150, "h.1.attn": 75, "h.1.mlp": 150}
    assert plan(shapes, layers={"*": 1}).total == 0
    # The last pattern that matches wins.
    assert plan(shapes, layers={"h.0.mlp": 1, "h.0.*": 0.5}).nnz["h.0.mlp"] == 100
    assert plan(shapes, layers={"h.0.*": 0.5, "h.0.mlp": 1}).nnz["h.0.mlp"] == 0


@pytest.mark.parametrize("level", [0.1, 0.7, 0.9])
def test_own_levels_round_like_the_target(level):
    shape = (768, 3072)
    assert plan({"w": shape}, layers={"w": level}).nnz == plan({"w": shape}, target=level).nnz


def test_levels_are_the_decimals_they_are_written_as():
    """5.5 up is 6; as a float 0.45 is a little more, and 5.49 would be 5."""
    assert plan({"w": (1, 10)}, layers={"w": 0.45}).nnz == plan({"w": (1, 10)}, target=0.45).nnz == {"w": 6}


def test_own_level_pattern_without_a_match():
    with pytest.raises(ConfigError) as error:
        plan({"h.0.attn": (2, 2), "h.0.mlp": (2, 2)}, layers={"h.0.atn": 0.5})
    assert str(error.value) == (
        "Expected sparsity.layers pattern 'h.0.atn' to match a sparse weight. Got no match among: h.0.attn, h.0.mlp ... "
        "Correct the pattern; `raysparse plan` lists every name."
    )


def test_fewer_live_weights_than_layers():
    with pytest.raises(ConfigError) as error:
        plan(vectors(4, 4, 4), target=0.9)
    assert str(error.value) == (
        "Expected at least one live weight (or block) in each of 3 layers. Got 1 for all of them. "
        "Lower sparsity.target, or empty a layer explicitly with sparsity.layers."
    )
    assert plan(vectors(4, 4, 4), target=0.75).nnz == {"a": 1, "b": 1, "c": 1}


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        ({"target": 1}, "target: Input should be less than 1 (got 1)"),
        ({"target": -0.1}, "target: Input should be greater than or equal to 0 (got -0.1)"),
        ({"target": float("nan")}, "target: Input should be "),
        ({"layers": {"w": 1.5}}, "layers.w: Input should be less than or equal to 1 (got 1.5)"),
        ({"layers": {"w": -1}}, "layers.w: Input should be greater than or equal to 0 (got -1)"),
        ({"include": "all_linears"}, "include"),
    ],
)
def test_config_out_of_range(config, problem):
    with pytest.raises(ConfigError) as error:
        SparsityConfig.check(config)
    assert f"\n  {problem}" in str(error.value)


def test_no_layers():
    empty = plan({}, target=0.5)
    assert (empty.total, empty.size, empty.sparsity, empty.nnz) == (0, 0, 0.0, {})


def test_target_zero_is_dense():
    found = plan({"a": (3, 5), "b": (7, 2)})
    assert found.nnz == {"a": 15, "b": 14}
    assert found.sparsity == 0.0


def test_share_out_splits_a_given_total():
    for total in range(3, 31):
        found = share_out(vectors(5, 10, 15), total, Uniform())
        assert sum(found.values()) == total
        for name, n in (("a", 5), ("b", 10), ("c", 15)):
            share = Fraction(total * n, 30)
            assert max(1, floor(share)) <= found[name] <= max(1, ceil(share))


@pytest.mark.parametrize(
    ("pattern", "shapes", "config", "factor", "nnz"),
    [
        ({"type": "n:m"}, {"a": (3, 8), "b": (5, 4)}, {"target": 0.5}, 1, [12, 10]),
        ({"type": "n:m"}, {"a": (3, 8), "b": (5, 4)}, {"target": 0.5}, Fraction(1, 2), [18, 15]),  # 3 of 4
        ({"type": "n:m"}, {"a": (3, 8), "b": (5, 4)}, {"target": 0.5}, Fraction(1, 4), [24, 20]),  # 3.5 of 4, up
        ({"type": "n:m", "n": 1, "m": 3}, {"a": (2, 9)}, {"target": 0.666667}, 1, [6]),
        ({"type": "n:m"}, {"a": (3, 8)}, {"target": 0.5}, 0, [24]),
        # 12 + 6 blocks, 0.4 of them live: 7.2 and so 7, of which 4.67 and 2.33
        ({"type": "block", "size": 16}, {"a": (48, 64), "b": (32, 48)}, {"target": 0.6}, 1, [5 * 256, 2 * 256]),
        # at half the target 0.7 of them: 12.6 and so 13, of which 8.67 and 4.33
        ({"type": "block", "size": 16}, {"a": (48, 64), "b": (32, 48)}, {"target": 0.6}, Fraction(1, 2), [9 * 256, 4 * 256]),
        ({"type": "block", "size": 16}, {"a": (48, 64), "b": (32, 48)}, {"target": 0.6, "layers": {"b": 0.9}}, 1, [5 * 256, 256]),
        # constant fan-in: rows of 4 and 3 blocks, 1.56 and 1.17 in each
        ({"type": "block", "size": 16, "fan_in": "constant"}, {"a": (48, 64), "b": (32, 48)}, {"target": 0.6}, 1, [6 * 256, 2 * 256]),
        ({"type": "block", "size": 16, "fan_in": "constant"}, {"a": (48, 64)}, {"target": 0.9}, 1, [3 * 256]),  # never none in a row
        ({"type": "block", "size": 16, "fan_in": "constant"}, {"a": (48, 64)}, {"layers": {"a": 1}}, 1, [0]),
        ({"type": "block", "size": 16, "fan_in": "constant"}, {"a": (48, 64)}, {"layers": {"a": 1}}, Fraction(1, 2), [6 * 256]),
        # 8.33 and exactly 7
        ({"type": "unstructured"}, {"a": (1, 10), "b": (1, 10)}, {"target": 0.5, "layers": {"b": 0.9}}, Fraction(1, 3), [8, 7]),
    ],
)
def test_units_of_the_pattern_and_a_share_of_the_target(pattern, shapes, config, factor, nnz):
    found = SparsityPlan.build(shapes, SparsityConfig.check({"pattern": pattern} | config), Fraction(factor))
    assert list(found.nnz.values()) == nnz


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.type)
def test_a_share_of_the_target_is_the_target_that_it_is(kind):
    shapes = {"a": (7, 5), "b": (13, 9), "c": (2, 3)}
    config = SparsityConfig(target=0.8, distribution=kind, layers={"c": 0.4})
    for percent in range(0, 101, 5):
        moved = SparsityConfig(target=round(0.008 * percent, 3), distribution=kind, layers={"c": round(0.004 * percent, 3)})
        assert SparsityPlan.build(shapes, config, Fraction(percent, 100)) == SparsityPlan.build(shapes, moved)


def test_no_block_left_for_a_layer():
    with pytest.raises(ConfigError, match=r"^Expected at least one live weight \(or block\) in each of 2 layers\. Got 1 for all of them\."):
        plan({"a": (32, 32), "b": (32, 32)}, target=0.9, pattern={"type": "block", "size": 16})
