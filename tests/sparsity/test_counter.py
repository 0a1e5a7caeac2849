"""Numbers that depend on nothing but their key and index."""

import os
import subprocess
import sys

import pytest
import torch

from raysparse.kernels import library
from raysparse.sparsity import counter

WORD = 1 << 64
needs_native = pytest.mark.skipif(not library.available(), reason="needs the native library")


@pytest.fixture(params=[pytest.param("native", marks=needs_native), "torch"])
def way(request, monkeypatch):
    """Both ways to make the numbers, which must not differ in a bit."""
    if request.param == "torch":
        monkeypatch.setattr(library, "available", lambda: False)


def splitmix64(state: int) -> int:
    """The output function of splitmix64 on unsigned Python integers, as in Steele, Lea and Flood."""
    z = state * 0x9E3779B97F4A7C15 % WORD
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % WORD
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % WORD
    return z ^ (z >> 31)


def signed(word: int) -> int:
    return word - WORD if word >= WORD // 2 else word


def test_the_reference_is_splitmix64():
    # The published first outputs of the generator seeded with 1234567: its state grows by the golden constant each time.
    golden_inverse = pow(0x9E3779B97F4A7C15, -1, WORD)
    first = [splitmix64((1234567 * golden_inverse + i) % WORD) for i in (1, 2, 3)]
    assert first == [6457827717110365317, 3203168211198807973, 9817491932198370423]


@pytest.mark.parametrize("key", [0, 1, -1, 2**63 - 1, -(2**63), 0x123456789ABCDEF])
@pytest.mark.parametrize("index", [0, 1, 2, 12345, 2**31, 2**40 + 7, 2**62])
def test_mix(way, key, index):
    assert counter.mix(torch.tensor([index]), key).tolist() == [signed(splitmix64((index + key) % WORD))]


@pytest.mark.parametrize(
    ("key", "first", "keys"),
    [
        #        element:  first       + 1         + 2         + 3
        (0, 0, [0, 1896895516, 926699317, 56766092]),
        (1, 0, [1896895516, 926699317, 56766092, 2084953172]),
        (-7, 1 << 33, [1437843050, 1011777791, 211218898, 465526162]),
        (42, 999, [1932799039, 56036906, 1694754869, 835313794]),
    ],
)
def test_known_keys(way, key, first, keys):
    found = counter.random_keys(first, 4, key)
    assert found.dtype == torch.int32
    assert found.tolist() == keys == [splitmix64((first + i + key) % WORD) >> 33 for i in range(4)]


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 8, 100])
@pytest.mark.parametrize("count", [0, 1, 6, 7, 8, 13, 14, 15])
def test_chunks_change_nothing(monkeypatch, chunk, count):
    monkeypatch.setattr(library, "available", lambda: False)  # native code has no chunks
    whole = counter.random_keys(5, count, 99)
    monkeypatch.setattr(counter, "CHUNK", chunk)
    assert torch.equal(counter.random_keys(5, count, 99), whole)


def test_chunk_borders_of_the_real_size(way):
    n = counter.CHUNK
    keys = counter.random_keys(0, 2 * n + 1, 3)
    for at in (0, n - 1, n, n + 1, 2 * n - 1, 2 * n):
        assert int(keys[at]) == splitmix64(at + 3) >> 33


@pytest.mark.parametrize("split", [0, 1, 10, 63, 64])
def test_any_part_can_be_drawn_alone(way, split):
    whole = counter.random_keys(0, 64, 7)
    assert torch.equal(torch.cat([counter.random_keys(0, split, 7), counter.random_keys(split, 64 - split, 7)]), whole)


def test_keys_are_uniform_int32(way):
    n = 1 << 20
    keys = counter.random_keys(0, n, counter.key(0, "mask", "h.0.attn.c_attn.weight"))
    assert keys.min() >= 0
    assert keys.max() <= 2**31 - 1
    # 64 cells of n / 64 expected: chi-square has mean 63 and standard deviation 11.2; 130 is six of them away.
    for bits in (25, 0):  # the highest and the lowest six bits
        cells = torch.bincount((keys >> bits) & 63, minlength=64).double()
        assert float(((cells - n / 64) ** 2 / (n / 64)).sum()) < 130
    # Neighbours, and the same element under neighbouring keys, are unrelated: |correlation| of n pairs is below 6 / sqrt(n).
    x = keys.double() - keys.double().mean()
    other = counter.random_keys(0, n, counter.key(1, "mask", "h.0.attn.c_attn.weight")).double()
    for y in (x.roll(1), x.roll(768), other - other.mean()):
        assert abs(float((x * y).mean() / (x.std() * y.std()))) < 6 / n**0.5
    # Birthdays: n^2 / 2^32 = 256 pairs of equal keys are expected among 2^31 values.
    assert abs(n - keys.unique().numel() - 256) < 6 * 16


def test_the_global_generator_is_left_alone(way):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    counter.random_keys(0, 10, counter.key("a"))
    assert torch.equal(torch.get_rng_state(), before)


def test_key():
    assert counter.key(3, "mask", "h.0") == -7699923712889277756
    assert counter.key() == -5426141060434712860
    parts = [(), (0,), (1,), (0, 1), (1, 0), (3, "mask", "h.0"), (3, "mask", "h.1"), (4, "mask", "h.0"), ("mask", 3, "h.0")]
    keys = [counter.key(*part) for part in parts]
    assert len(set(keys)) == len(parts)
    assert all(-(2**63) <= key < 2**63 for key in keys)
    assert any(key < 0 for key in keys)


@pytest.mark.parametrize("hashseed", ["0", "1"])
def test_key_does_not_hash_as_python_does(hashseed):
    """`hash` of a name differs between processes; a mask drawn from it would differ between ranks."""
    code = "from raysparse.sparsity import counter; print(counter.key(3, 'mask', 'h.0'), hash('h.0'))"
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONHASHSEED": hashseed}, capture_output=True, text=True, check=True
    )
    key, hashed = map(int, done.stdout.split())
    assert key == counter.key(3, "mask", "h.0")
    assert hashed != hash("h.0")  # else this test shows nothing
