"""Units and groups by hand, and shapes that cannot be cut into them."""

import pytest

from raysparse.config import Config, ConfigError
from raysparse.sparsity.pattern import NM, AnyPattern, Block, Unstructured
from raysparse.sparsity.plan import SparsityConfig


class Holder(Config):
    pattern: AnyPattern


@pytest.mark.parametrize(
    ("pattern", "shape", "unit", "units", "group", "groups"),
    [
        (Unstructured(), (7, 5), (1, 1), (7, 5), 0, 0),
        (NM(), (7, 12), (1, 1), (7, 12), 4, 21),
        (NM(n=4, m=8), (3, 16), (1, 1), (3, 16), 8, 6),
        (NM(n=1, m=3), (2, 9), (1, 1), (2, 9), 3, 6),
        (Block(size=16), (48, 64), (16, 16), (3, 4), 0, 0),
        (Block(size=16, fan_in="constant"), (48, 64), (16, 16), (3, 4), 4, 3),
        (Block(size="4x2", fan_in="constant"), (8, 10), (4, 2), (2, 5), 5, 2),
        (Block(size=128, fan_in="constant"), (256, 640), (128, 128), (2, 5), 5, 2),
    ],
    ids=str,
)
def test_units_and_groups(pattern, shape, unit, units, group, groups):
    pattern.check_shape("w", shape, 1)
    assert (pattern.unit, pattern.units(shape), pattern.group(shape[1]), pattern.num_groups(shape)) == (unit, units, group, groups)
    assert Holder.check({"pattern": pattern.model_dump(mode="json")}).pattern == pattern


@pytest.mark.parametrize(
    ("pattern", "shape", "shards", "text"),
    [
        (
            NM(),
            (8, 10),
            1,
            "Expected h.0.w to have rows (on every rank) that 1 divides and columns that 4 divides, for pattern "
            "{'type': 'n:m', 'n': 2, 'm': 4}. Got 8 x 10. "
            "Leave it out with sparsity.exclude, or choose another pattern or number of workers.",
        ),
        (Block(size=16), (40, 32), 1, "rows (on every rank) that 16 divides and columns that 16 divides"),
        (Block(size=32), (64, 48), 1, "Got 64 x 48. Leave"),
        (Block(size=32, fan_in="constant"), (64, 16), 1, "Got 64 x 16. Leave"),
        (Block(size=32), (96, 64), 2, "Got 96 x 64, 48 rows on each of 2 ranks. Leave"),
        (Block(size=32), (64, 64), 3, "Got 64 x 64, 22 rows on each of 3 ranks. Leave"),
    ],
    ids=str,
)
def test_shapes_that_do_not_fit(pattern, shape, shards, text):
    with pytest.raises(ConfigError) as error:
        pattern.check_shape("h.0.w", shape, shards)
    assert text in str(error.value)


@pytest.mark.parametrize(
    ("pattern", "shape", "shards"),
    [
        (Unstructured(), (1, 1), 5),
        (NM(), (7, 4), 3),  # groups lie within a row
        (Block(size=32), (96, 64), 3),
        (Block(size=32), (2080, 64), 33),  # 64 rows on all ranks but the last, 32 there
        (Block(size=32), (32, 64), 1),
    ],
    ids=str,
)
def test_shapes_that_fit(pattern, shape, shards):
    pattern.check_shape("w", shape, shards)


@pytest.mark.parametrize(
    ("pattern", "problem"),
    [
        ({"type": "n:m", "n": 4}, "Expected n < m. Got 4:4, which leaves nothing out"),
        ({"type": "n:m", "n": 0}, "pattern.n: Input should be greater than or equal to 1 (got 0)"),
        ({"type": "n:m", "m": 128}, "pattern.m: Input should be less than or equal to 64 (got 128)"),
        ({"type": "block", "size": 24}, "pattern.size: Input should be '4x2', 4, 8, 16, 32, 64 or 128 (got 24)"),
        ({"type": "block", "fan_in": "equal"}, "pattern.fan_in: Input should be 'free' or 'constant' (got 'equal')"),
        ({"type": "2:4"}, "expected tags: 'unstructured', 'n:m', 'block'"),
    ],
)
def test_what_is_refused(pattern, problem):
    with pytest.raises(ConfigError) as error:
        Holder.check({"pattern": pattern})
    assert problem in str(error.value)


@pytest.mark.parametrize("other", [{"target": 0.6}, {"target": 0.5, "distribution": {"type": "er"}}, {"target": 0.5, "layers": {"*": 0.5}}])
def test_n_of_m_fixes_target_and_distribution(other):
    with pytest.raises(ConfigError, match=r"Expected target 0\.5, distribution uniform and no layers for pattern 2:4\. Set them"):
        SparsityConfig.check({"pattern": {"type": "n:m"}} | other)


@pytest.mark.parametrize(
    ("n", "m", "target"), [(2, 4, 0.5), (1, 4, 0.75), (1, 3, 0.666667), (1, 3, 2 / 3), (5, 7, 0.285714), (1, 48, 0.979167)]
)
def test_n_of_m_takes_the_target_that_its_message_asks_for(n, m, target):
    """Also where no decimal is exact; given masks and dense runs bring no target."""
    pattern = {"type": "n:m", "n": n, "m": m}
    with pytest.raises(ConfigError, match=f"Expected target {target:.6g},"):
        SparsityConfig.check({"pattern": pattern, "target": target - 1e-3})
    assert SparsityConfig.check({"pattern": pattern, "target": target}).wants_masks
    assert SparsityConfig.check({"pattern": pattern, "masks": "earlier"}).given
    assert not SparsityConfig.check({"pattern": pattern}).wants_masks
