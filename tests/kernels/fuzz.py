"""Drawn cases under AddressSanitizer and UBSan against definitions in float64: ``python -m tests.kernels.fuzz``, or ``make fuzz``.

The sources are compiled with the flags of setup.py and the sanitizers into a folder of their own, and each build that this CPU runs is put
to the same cases in a process that dies at the first bad access or undefined step. A kernel joins by an entry in `CASES`.
"""

import argparse
import ctypes
import os
import random
import runpy
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor

from raysparse.kernels import attention, decode, library, select
from raysparse.kernels import random as splitmix
from raysparse.kernels.stream import Stream, Use
from raysparse.sparsity.attention import Fixed, Full, Local, LocalOrStrided, Pattern, Strided
from tests.kernels import streams, test_adamw, test_attention, test_live, test_select
from tests.kernels.conftest import forget
from tests.sparsity import test_counter

ROOT = Path(__file__).parents[2]
NATIVE = ROOT / "raysparse" / "kernels" / "native"
SANITIZE = ["-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g1"]
UNSUPPORTED = 3
"""Exit status of a process whose CPU does not run the build."""


def sanitizer() -> str | None:
    """Path of the AddressSanitizer of g++; None where there is none."""
    try:
        found = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
    return found if Path(found).is_absolute() else None  # g++ repeats a name that it does not find


def build(folder: Path, only: Sequence[str] = library.VARIANTS) -> Path:
    """Compile builds into `folder`, which it returns, with the sanitizers. What is up to date is not compiled again."""
    folder.mkdir(parents=True, exist_ok=True)
    for variant, flags in setup_flags().items():
        if variant in only:
            objects = compile_sources("g++", [*flags, *SANITIZE], folder, variant)
            subprocess.run(["g++", "-shared", *SANITIZE, *objects, "-o", str(folder / f"_{variant}.so")], check=True)
    return folder


def setup_flags() -> dict[str, list[str]]:
    """The compiler's flags in setup.py for each build, but for optimization, with which sanitized code takes minutes to compile."""
    with patch("setuptools.setup"):
        found = runpy.run_path(str(ROOT / "setup.py"))
    return {variant: [flag for flag in (*found["COMMON"], *flags) if flag != "-O3"] for variant, flags in found["VARIANTS"].items()}


def compile_sources(compiler: str, flags: Sequence[str], folder: Path, suffix: str) -> list[str]:
    """The object files of all native sources."""
    newest_header = max(file.stat().st_mtime for file in NATIVE.glob("*.h"))

    def compile_one(source: Path) -> str:
        made = folder / f"{source.stem}.{suffix}.o"
        if not made.exists() or made.stat().st_mtime < max(source.stat().st_mtime, newest_header):
            subprocess.run([compiler, "-c", "-fPIC", *flags, str(source), "-o", str(made)], check=True)
        return str(made)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(compile_one, sorted(NATIVE.glob("*.cpp"))))


def run_apart(where: Path, variant: str, *words: str) -> subprocess.CompletedProcess[str]:
    """This module in a process that has the sanitizers loaded, on one build of those in `where`."""
    environment = os.environ | {
        "LD_PRELOAD": str(sanitizer()),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python itself keeps memory to its end
        "UBSAN_OPTIONS": "print_stacktrace=1",
        library.CHOICE: variant,
    }
    command = [sys.executable, "-m", "tests.kernels.fuzz", "--here", str(where), *words]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def fuzz_stream(rng: random.Random) -> None:
    streams.check(streams.draw(rng))


def fuzz_attention(rng: random.Random) -> None:
    """Any pattern for any head, on rows of any length."""
    length, key_heads = rng.choice([1, 2, 7, 31, 64, 65, 130, 200]), rng.choice([1, 2, 3])
    heads, width = key_heads * rng.choice([1, 2]), rng.choice([1, 3, 8, 16, 17, 64, 80])

    def pattern() -> Pattern:
        size = rng.randint(1, length + 3)
        return rng.choice([Full(), Local(width=size), Strided(stride=size), Fixed(width=size), LocalOrStrided(width=size, stride=1 + size)])

    dtype = rng.choice([torch.float32, torch.bfloat16])
    tensors = test_attention.inputs(rng.choice([1, 2]), heads, key_heads, length, width, dtype)
    patterns = [pattern() for _ in range(heads)]
    test_attention.check(tensors, patterns)
    wild = [tensor.detach().clone() for tensor in tensors]
    wild[rng.randrange(4)][0, 0, rng.randrange(length), rng.randrange(width)] = rng.choice([torch.nan, torch.inf, -torch.inf])
    test_attention.run([*(tensor.requires_grad_() for tensor in wild[:3]), wild[3]], test_attention.rules_of(patterns))


def fuzz_decode(rng: random.Random) -> None:
    """Packed weights of every kind; then the same with something broken in its arrays, which is refused or harmless."""
    rows, cols, tokens = (
        rng.choice([0, 1, 5, 33, 96]),
        rng.choice([0, 1, 2, 63, 64, 65, 130, 257, 521]),
        rng.choice([0, 1, 2, 3, 7, 8, 9, 33]),
    )
    g = torch.Generator().manual_seed(rng.getrandbits(32))
    dense = torch.randn(rows, cols, generator=g) * (torch.rand(rows, cols, generator=g) < rng.choice([0, 0.02, 0.25, 0.9, 1]))
    dtype = rng.choice([torch.float32, torch.bfloat16, torch.int8])
    weight = decode.pack(dense, dtype, rng.choice(["bits", "columns", "dense"]))
    step, bias = rng.choice([1, 2]), torch.randn(rows, generator=g).to(weight.dtype) if rng.random() < 0.5 else None
    x = torch.randn(tokens, step * cols, generator=g).to(weight.dtype)[:, ::step]
    y = decode.linear(weight, x, bias)
    unpacked = decode.unpack(weight).double()
    largest = (x.double().abs().amax(1, keepdim=True) if cols else torch.zeros(tokens, 1)) * (2**-15 if dtype == torch.int8 else 0)
    added = torch.zeros(rows).double() if bias is None else bias.double()
    slack = largest * unpacked.abs().sum(1) + added.abs() * 2**-22
    exact = x.double() @ unpacked.t() + added
    bound = (
        slack
        + (x.double().abs() @ unpacked.t().abs()) * 2**-23 * (cols + 2)
        + exact.abs() * (2**-8 if y.dtype == torch.bfloat16 else 2**-23)
    )
    assert bool(((y.double() - exact).abs() <= bound + 1e-30).all())
    if tokens and cols:
        wild, token = x.clone(), rng.randrange(tokens)
        wild[token, rng.randrange(cols)] = rng.choice([torch.nan, torch.inf, -torch.inf])
        others = torch.arange(tokens) != token
        beside = decode.linear(weight, wild, bias)
        assert bool(((beside.double() - exact).abs() <= bound + 1e-30)[others].all())
    broken = _broken(weight, rng)
    if decode.problem(broken) is None:
        decode.linear(broken, x)
        decode.unpack(broken)


def _broken(weight: decode.Packed, rng: random.Random) -> decode.Packed:
    """With a few bytes of one of its index arrays changed."""
    arrays = [name for name in ("starts", "bits", "columns") if getattr(weight, name) is not None and getattr(weight, name).numel()]
    if not arrays:
        return weight
    name = rng.choice(arrays)
    changed: Tensor = getattr(weight, name).clone()
    flat = changed.view(torch.uint8).view(-1)
    for _ in range(rng.choice([1, 2, 5])):
        flat[rng.randrange(len(flat))] = rng.randrange(256)
    return replace(decode.Packed(*(getattr(weight, f.name) for f in fields(weight))), **{name: changed})


def fuzz_select(rng: random.Random) -> None:
    """All passes of a selection over keys that are often equal, with a list that is too short, just enough or too long."""
    size, shift = rng.choice([0, 1, 2, 63, 64, 65, 127, 129, 1000, 4099]), rng.choice([0, 10, 20])
    keys, eligible = test_select.drawn(rng.getrandbits(31), size)
    digits = ((keys.long() & 0x7FFFFFFF) >> shift).where(eligible, -1)
    low, high = sorted(rng.choice([*digits.clamp(min=0).tolist()[:50], 0, 2**31 >> shift]) for _ in range(2))
    between = ((low <= digits) & (digits <= high)).nonzero().flatten()
    mask, index, listed, chosen = select.choose(keys, eligible, shift, low, high, rng.choice([0, len(between), len(between) + 5]))
    assert torch.equal(mask, digits > high)
    assert torch.equal(index, between)
    assert torch.equal(listed, keys[between])
    assert chosen == int(mask.sum())
    bits = rng.randint(1, select.MAX_BITS)
    lower = rng.randint(0, 31 - bits)
    digit = (listed.long() & 0x7FFFFFFF) >> lower & ((1 << bits) - 1)
    assert torch.equal(select.count_digits(listed, None, lower, bits), torch.bincount(digit, minlength=1 << bits))
    cut, expected = rng.randrange(1 << bits), mask.clone()
    expected[index[digit > cut]] = True
    kept = index[digit == cut]
    assert torch.equal(select.refine(mask, index.clone(), listed.clone(), lower, bits, cut)[0], kept)
    assert torch.equal(mask, expected)


def fuzz_random(rng: random.Random) -> None:
    """Numbers anywhere in 64 bits, where sums wrap around."""
    first, key, count = (rng.choice([0, rng.getrandbits(63), 2**63 - 1]), rng.getrandbits(64) - 2**63, rng.choice([0, 1, 7, 16, 33, 100]))
    index = torch.tensor([rng.getrandbits(64) - 2**63 for _ in range(count)], dtype=torch.int64)
    word = test_counter.WORD
    assert splitmix.mix(index, key).tolist() == [test_counter.signed(test_counter.splitmix64((i + key) % word)) for i in index.tolist()]
    keys = [test_counter.splitmix64((first + i + key) % word) >> 33 for i in range(count)]
    assert splitmix.random_keys(first, count, key).tolist() == keys


CASES: Mapping[str, Callable[[random.Random], None]] = {
    "stream": fuzz_stream,
    "attention": fuzz_attention,
    "decode": fuzz_decode,
    "select": fuzz_select,
    "random": fuzz_random,
    "adamw": test_adamw.check_drawn,
    "live": test_live.check_drawn,
}


def fuzz(seed: int, cases: int, kernel: str | None) -> None:
    """As many cases of each kernel; one that fails is told by its number, with which it comes again."""
    attention.SHORTEST = 1
    for name, run in CASES.items():
        for case in range(cases) if kernel in (None, name) else ():
            rng = random.Random(f"{seed} {name} {case}")
            torch.set_num_threads(rng.choice([1, 1, 2, 3]))
            try:
                run(rng)
            except AssertionError as error:
                raise AssertionError(f"{name}, case {case} of seed {seed}: {error}") from error


def reach_outside() -> None:
    """A product that is told of one token more than there are: what the sanitizers must see."""
    stream = Stream(torch.full((8, 8), 255, dtype=torch.uint8), 64, torch.float32, Use.FORWARD)
    stream.load(torch.ones(8, 64))
    x, y = torch.ones(3, 64), torch.empty(8, 8)
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    multiply = library.function("rs_multiply_f32", None, pointer, pointer, size, pointer, pointer, ctypes.c_int)
    multiply(stream._handle, x.data_ptr(), 4, None, y.data_ptr(), 1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=1000, help="of each kernel")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kernel", choices=CASES, help="this one alone")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "sanitized", help="where the builds lie and stay")
    parser.add_argument("--here", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--outside", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.here is not None:
        library.FOLDER = args.here
        forget()  # the build that was loaded while modules were imported
        if (reason := library.why_not()) is not None:
            print(reason)
            return UNSUPPORTED
        reach_outside() if args.outside else fuzz(args.seed, args.cases, args.kernel)
        return 0
    if sanitizer() is None:
        print("Expected g++ with AddressSanitizer. Got none. Install g++ and libasan.", file=sys.stderr)
        return 2
    where, worst = build(args.folder), 0
    for variant in library.VARIANTS:
        words = ["--seed", str(args.seed), "--cases", str(args.cases), *(["--kernel", args.kernel] if args.kernel else [])]
        done = run_apart(where, variant, *words)
        says = {0: f"{args.cases} cases of each kernel are right", UNSUPPORTED: done.stdout.strip()}
        print(f"{variant:<9} {says.get(done.returncode, f'failed{chr(10)}{done.stdout}{done.stderr}')}", flush=True)
        worst = max(worst, 0 if done.returncode in (0, UNSUPPORTED) else 1)
    return worst


if __name__ == "__main__":
    sys.exit(main())
