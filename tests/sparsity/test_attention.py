"""Patterns of attention: what each allows, how many pairs that are, and how they are laid out over layers and heads."""

import subprocess
import sys
import time

import pytest
import torch

from raysparse.config import Config, ConfigError
from raysparse.sparsity.attention import AnyAttention, ByHead, ByLayer, Fixed, Full, Local, LocalOrStrided, Pattern, Strided

PATTERNS = [
    Full(),
    *(Local(width=width) for width in (1, 4, 7, 100)),
    *(Strided(stride=stride) for stride in (1, 4, 7, 100)),
    *(LocalOrStrided(width=w, stride=s) for w, s in ((1, 1), (1, 5), (5, 1), (4, 4), (3, 7), (7, 3), (8, 3), (9, 3), (100, 2), (2, 100))),
    *(Fixed(width=width) for width in (1, 4, 7, 100)),
]


def sees(pattern: Pattern, q: int, k: int) -> bool:
    """The definition, in words of the papers."""
    if k > q:
        return False
    match pattern:
        case Full():
            return True
        case Local(width=width):
            return k in range(q - width + 1, q + 1)
        case Strided(stride=stride):
            return k in range(q, -1, -stride)
        case LocalOrStrided(width=width, stride=stride):
            return k in range(q - width + 1, q + 1) or k in range(q, -1, -stride)
        case Fixed(width=width):
            start = next(start for start in range(0, q + 1, width) if q < start + width)
            return k >= start or k in range(width - 1, start, width)
    raise AssertionError(pattern)


def drawn(pattern: Pattern, length: int) -> list[str]:
    at = torch.arange(length)
    return ["".join("x" if allowed else "." for allowed in row) for row in pattern.allows(at[:, None], at).tolist()]


def test_local():
    assert drawn(Local(width=2), 5) == [
        "x....",
        "xx...",
        ".xx..",
        "..xx.",
        "...xx",
    ]


def test_strided():
    assert drawn(Strided(stride=3), 7) == [
        "x......",
        ".x.....",
        "..x....",
        "x..x...",
        ".x..x..",
        "..x..x.",
        "x..x..x",
    ]


def test_local_or_strided():
    assert drawn(LocalOrStrided(width=2, stride=3), 7) == [
        "x......",
        "xx.....",
        ".xx....",
        "x.xx...",
        ".x.xx..",
        "..x.xx.",
        "x..x.xx",
    ]


def test_fixed():
    assert drawn(Fixed(width=3), 8) == [
        "x.......",
        "xx......",
        "xxx.....",
        "..xx....",
        "..xxx...",
        "..xxxx..",
        "..x..xx.",
        "..x..xxx",
    ]


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_allows_what_the_definition_says(pattern):
    length = 23  # whole blocks of none of the widths
    at = torch.arange(length)
    assert pattern.allows(at[:, None], at).tolist() == [[sees(pattern, q, k) for k in range(length)] for q in range(length)]
    assert pattern.allows(at[:, None].int(), at.int()).equal(pattern.allows(at[:, None], at))
    assert pattern.allows(20, 13) is sees(pattern, 20, 13)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_counts_are_exact(pattern):
    for length in (*range(1, 24), 100, 101):
        at = torch.arange(length)
        allowed = int(pattern.allows(at[:, None], at).sum())
        assert pattern.num_pairs(length) == allowed
        assert pattern.density(length) == allowed / (length * (length + 1) // 2)
        assert pattern.mean_density(length, 3, 5) == pattern.density(length)


@pytest.mark.parametrize(
    ("pattern", "density", "keys"),
    [(Full(), 1, 512.5), (Local(), 0.234, 120), (Strided(), 0.0088, 4.5), (LocalOrStrided(), 0.241, 124), (Fixed(), 0.133, 68)],
    ids=str,
)
def test_densities_of_mst(pattern, density, keys):
    assert pattern.density(1024) == pytest.approx(density, rel=5e-3)
    assert pattern.num_pairs(1024) / 1024 == pytest.approx(keys, abs=0.5)


def test_densities_of_the_smallest_and_the_longest_rows():
    assert [pattern.density(1) for pattern in PATTERNS] == [1.0] * len(PATTERNS)
    assert Full().density(8192) == Local(width=8192).density(8192) == Strided(stride=1).density(8192) == 1
    began = time.perf_counter()
    densities = [pattern.mean_density(8192, 96, 96) for pattern in PATTERNS]
    assert time.perf_counter() - began < 1
    assert min(densities) == Local(width=1).density(8192) == 8192 / (8192 * 8193 / 2)


def test_heads_and_layers_take_turns():
    local, strided, full = Local(width=3), Strided(stride=2), Full()
    heads = ByHead(heads=(local, strided))
    layers = ByLayer(layers=(full, heads, strided))
    assert [heads.of(7, head) for head in range(5)] == [local, strided, local, strided, local]
    assert [[layers.of(layer, head) for head in range(3)] for layer in range(5)] == [
        [full, full, full],
        [local, strided, local],
        [strided, strided, strided],
        [full, full, full],
        [local, strided, local],
    ]
    assert full.of(4, 2) is full


def test_mean_density_is_the_mean_of_all_heads():
    heads = ByHead(heads=(Local(width=3), Strided(stride=2)))
    for attention in (heads, ByLayer(layers=(Full(), heads, Strided(stride=4)))):
        each = [attention.of(layer, head).density(20) for layer in range(5) for head in range(3)]
        assert attention.mean_density(20, layers=5, heads=3) == pytest.approx(sum(each) / len(each), rel=1e-12)


class Phase(Config):
    attention: AnyAttention = Full()


def test_named_in_a_config():
    simple = [{"type": "local", "width": 3}, {"type": "strided"}, {"type": "local_or_strided", "stride": 9}, {"type": "fixed"}]
    values = {"type": "by_layer", "layers": [{"type": "full"}, {"type": "by_head", "heads": simple}]}
    attention = Phase.check({"attention": values}).attention
    heads = ByHead(heads=(Local(width=3), Strided(stride=128), LocalOrStrided(width=128, stride=9), Fixed(width=128)))
    assert attention == ByLayer(layers=(Full(), heads))
    assert Phase.check(Phase(attention=attention).model_dump(mode="json")).attention == attention


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"type": "dense"}, "attention: Input tag 'dense' .* expected tags: 'full', 'local', .* 'by_head', 'by_layer'"),
        ({"type": "local", "width": 0}, "attention.width: Input should be greater than or equal to 1"),
        ({"type": "strided", "stride": 2**31}, "attention.stride: Input should be less than"),
        ({"type": "fixed", "stride": 4}, "attention.*stride: no such key"),
        ({"type": "by_head", "heads": []}, "attention.heads: Tuple should have at least 1 item"),
        ({"type": "by_layer", "layers": []}, "attention.layers: Tuple should have at least 1 item"),
        ({"type": "by_head", "heads": [{"type": "by_layer", "layers": []}]}, "attention.heads.0: Input tag 'by_layer'"),
    ],
)
def test_what_no_config_may_say(values, message):
    with pytest.raises(ConfigError, match=message):
        Phase.check({"attention": values})


def test_needs_no_torch():
    """An actor that decides imports it, and must start fast."""
    code = "import sys, raysparse.sparsity.attention; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
