"""What packed collectives save: steps of FSDP2 on ranks that are joined by slow links.

    python -m benchmarks.wire --rounds 3 --whole-model --out benchmarks/results     2 and 4 ranks, 1 to 10 Gbit/s; 15 minutes, as root
    python -m benchmarks.wire --ranks 2 --rates 1 0 --sparsities 0.75
    python -m benchmarks.wire --layouts                                             what an update of the topology costs the exchange

Each rank is a process in a network namespace of its own, which a virtual Ethernet cable joins to a bridge; ``tc`` shapes both ends of
every cable to the rate. The model is a stack of GPT-2 blocks, at least 90 % of its weights sparse. Whole and packed buffers take turns
in one process, step by step; times are wall-clock, of the rank that takes longest. Bytes are what left the rank's network interface,
headers and acknowledgements included. Dense kernels on both sides: the difference is the wire's. Exit status 1 if a goal is missed.

Where the system refuses namespaces or ``tc``, or with ``--throttle``, the process group is throttled instead: ranks share the loopback,
and each collective of a step is followed by a sleep of its payload over the rate. Its own time on the loopback comes on top, bytes are
those counted, and the results say so.

Predicted is payload / rate + host: the payload as `Wire` counts it, the rate of the link as measured with all ranks sending, and what the
machine takes besides (packing, adding, copies), which is the unshaped row's time less its own payload / rate.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tqdm import tqdm

from benchmarks.measure import Ratio, table, write
from benchmarks.step import Size, assemble
from raysparse.kernels.bits import pack, unpack
from raysparse.train.exchange import Choice, Layout, Wire
from raysparse.train.loop import forward_backward, update
from raysparse.train.shard import FSDP2, ShardingConfig

STACK = Size(layers=6, width=1024, vocabulary=256, tokens=32)
WHOLE_MODEL = Size(layers=12, width=768, vocabulary=50257, tokens=32)
NETWORK, PORT = "10.201.77", 29777
PATIENCE = timedelta(minutes=5)
"""For a collective."""
GOALS = {"communication": 3.0, "step": 2.0}
"""Whole over packed at 75 % and 1 Gbit/s."""
LEAST = 0.98
"""Whole over packed everywhere else: never slower by more than 2 %, or ``auto`` is off there."""


@dataclass(frozen=True)
class Link:
    """The cables of a run: so many ranks, each at so many Gbit/s; 0: as fast as they are. Throttled: no cables, but sleeps."""

    ranks: int
    gbit: float
    throttled: bool = False


def refusal() -> str | None:
    """Why no network of shaped links can be made here; None: it can."""
    try:
        with network(Link(1, 1)):
            return None
    except (SystemExit, FileNotFoundError) as error:
        return str(error)


@contextmanager
def network(link: Link) -> Iterator[list[str]]:
    """Namespaces that a bridge joins, with the shaped cables; yields their names."""
    own = f"rsw{os.getpid()}"  # names of at most 15 letters; several benchmarks may run
    made: list[tuple[str, ...]] = []

    def make(kind: str, *words: str) -> None:
        _run("ip", kind, "add", *words)
        made.append(("ip", kind, "del", words[0]))

    try:
        make("link", own, "type", "bridge")
        _run("ip", "link", "set", own, "up")
        for rank in range(link.ranks):
            name, cable = f"{own}-{rank}", f"{own}o{rank}"
            make("netns", name)
            make("link", cable, "type", "veth", "peer", "name", "eth0", "netns", name)
            _run("ip", "link", "set", cable, "master", own, "up")
            _run("ip", "-n", name, "addr", "add", f"{NETWORK}.{rank + 1}/24", "dev", "eth0")
            _run("ip", "-n", name, "link", "set", "eth0", "up")
            _run("ip", "-n", name, "link", "set", "lo", "up")
            if link.gbit:
                shape = ["tbf", "rate", f"{link.gbit}gbit", "burst", f"{max(256, round(200 * link.gbit))}kb", "latency", "20ms"]
                _run("tc", "-n", name, "qdisc", "add", "dev", "eth0", "root", *shape)
                _run("tc", "qdisc", "add", "dev", cable, "root", *shape)
        yield [f"{own}-{rank}" for rank in range(link.ranks)]
    finally:
        for command in reversed(made):
            subprocess.run(command, capture_output=True, check=False)


def launch(link: Link, words: Sequence[str]) -> Any:
    """Run the worker of this module on every rank of the network; returns what rank 0 prints."""
    made = nullcontext([""] * link.ranks) if link.throttled else network(link)
    with made as names, tempfile.TemporaryFile("w+") as said, ExitStack() as stack:
        processes = []
        for rank, name in enumerate(names):
            facts = {
                "RANK": rank,
                "WORLD_SIZE": link.ranks,
                "MASTER_ADDR": "127.0.0.1" if link.throttled else f"{NETWORK}.1",
                "MASTER_PORT": PORT,
                "GLOO_SOCKET_IFNAME": "lo" if link.throttled else "eth0",
            }
            command = [sys.executable, "-m", "benchmarks.wire", "--worker", *words]
            command = [*command, "--throttle", "--rates", str(link.gbit)] if link.throttled else ["ip", "netns", "exec", name, *command]
            environment = os.environ | {key: str(value) for key, value in facts.items()} | {"OMP_NUM_THREADS": "1"}
            processes.append(subprocess.Popen(command, env=environment, stdout=said if rank == 0 else subprocess.DEVNULL))
            stack.callback(processes[-1].kill)
        while (codes := [process.poll() for process in processes]) != [0] * link.ranks:
            if any(codes):
                raise SystemExit(f"Expected all ranks to run to their end. Got exit codes {codes}; what the ranks said is above.")
            time.sleep(0.2)
        said.seek(0)
        return json.loads(said.read().splitlines()[-1])


def worker(sparsities: Sequence[float], rounds: int, size: Size, throttle: float | None) -> None:
    """On one rank: `rounds` steps with whole and with packed buffers, in turns; rank 0 prints what each took and sent.

    Args:
        throttle: Gbit/s of the process group; None: what the link gives.
    """
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=PATIENCE)
    found: dict[str, Any] = {"rate": _rate() if throttle is None else [throttle, throttle]}
    for sparsity in sparsities:
        with tempfile.TemporaryDirectory() as folder:
            t = assemble(Path(folder) / "run", size, sparsity, ShardingConfig(packed="on"))
            assert isinstance(t.sharded, FSDP2)
            if throttle:
                _throttle(t.sharded.wire, throttle)
            ways = {"whole": Choice("off"), "packed": Choice("on")}
            rows: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
            for index in range(1 + rounds):
                for way in list(ways)[:: 1 if index % 2 else -1]:
                    t.sharded.choice = ways[way]
                    row = _step(t, index, throttle is not None)
                    if index:
                        rows[way].append(row)
            follow = [] if throttle is not None else [_seconds(t.follow) for _ in range(rounds)]
            total = sum(torch.Size(part.shape).numel() for part in t.sharded.parts.values())
            assert t.topology is not None
            share = sum(torch.Size(shape).numel() for shape in t.topology.shapes.values()) / total
            found[str(sparsity)] = {"rows": rows, "follow": follow, "parameters": total, "sparse_share": share}
    if dist.get_rank() == 0:
        print(json.dumps(found))
    dist.destroy_process_group()


def _rate(elements: int = 16 << 20) -> list[float]:
    """Gbit/s that a rank sends to its neighbour, when rank 0 alone does and when all do."""
    rank, size = dist.get_rank(), dist.get_world_size()
    mine, got, found = torch.zeros(elements), torch.empty(elements), []
    for everyone in (False, True):
        dist.barrier()
        began = time.perf_counter()
        work = [dist.isend(mine, (rank + 1) % size)] if everyone or rank == 0 else []
        work += [dist.irecv(got, (rank - 1) % size)] if everyone or rank == 1 else []
        for one in filter(None, work):
            one.wait()
        dist.barrier()
        found.append(32 * elements / (time.perf_counter() - began) / 1e9)
    return found


def _throttle(wire: Wire, gbit: float) -> None:
    """From here on a collective takes the time of its payload on a link, and what it takes anyhow."""
    timed = wire.timed

    @contextmanager
    def slower(device: torch.device) -> Iterator[None]:
        before = wire.bytes_sent
        with timed(device):
            yield
            time.sleep(8 * (wire.bytes_sent - before) / (1e9 * gbit))

    wire.timed = slower  # pyrefly: ignore


def _seconds(follow: Callable[[], None]) -> float:
    """Of the rank that takes longest, which has masks of the same density to gather and to make the layouts of."""
    dist.barrier()
    began, box = time.perf_counter(), [0.0] * dist.get_world_size()
    follow()
    dist.all_gather_object(box, time.perf_counter() - began)
    return max(box)


def _step(t: Any, index: int, throttled: bool) -> dict[str, float]:
    """Largest over the ranks of: seconds of a step, seconds in collectives, bytes that left the interface, payload as counted."""
    dist.barrier()
    wire, bytes_before = t.sharded.wire, 0 if throttled else _bytes_out()
    seconds, sent, began = wire.seconds, wire.bytes_sent, time.perf_counter()
    forward_backward(t, index)
    update(t, index)
    row = {
        "step": time.perf_counter() - began,
        "communication": wire.seconds - seconds,
        "interface": float(wire.bytes_sent - sent if throttled else _bytes_out() - bytes_before),
        "counted": float(wire.bytes_sent - sent),
    }
    box: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(box, row)
    return {key: max(other[key] for other in box) for key in row}


def layouts(num_ranks: int, rounds: int = 5) -> float:
    """Median seconds on a core to make the layouts of GPT-2 Small's 12 blocks at 75 % from the bits of the masks: once an update."""
    torch.set_num_threads(1)
    width, generator = 768, torch.Generator().manual_seed(0)
    shapes = {"qkv": (3 * width, width), "out": (width, width), "up": (4 * width, width), "down": (width, 4 * width)}
    bits = {name: pack(torch.rand(shape, generator=generator) < 0.25) for name, shape in shapes.items()}
    biases = {f"bias of {name}": shape[:1] for name, shape in shapes.items()}
    times = []
    for _ in range(rounds):
        began = time.perf_counter()
        for _ in range(12):
            Layout(shapes | biases, {name: unpack(packed, shapes[name][1]) for name, packed in bits.items()}, num_ranks)
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def _bytes_out() -> int:
    return int(Path("/sys/class/net/eth0/statistics/tx_bytes").read_text())


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(
            f"Expected to be root on Linux with network namespaces and tc. Got from `{' '.join(command)}`: {done.stderr.strip()}. "
            "Run it as root, or with --throttle, which needs neither."
        )


def rows_of(link: Link, found: dict[str, Any]) -> list[dict[str, Any]]:
    """Of each sparsity the ratios of whole to packed over the rounds, and medians of both."""
    rate, made = found.pop("rate"), []
    for sparsity, facts in found.items():
        rows = facts["rows"]
        ratio = {key: Ratio.of(*([row[key] for row in rows[way]] for way in ("whole", "packed"))) for key in rows["whole"][0]}
        middle = {way: {key: statistics.median(row[key] for row in rows[way]) for key in rows[way][0]} for way in rows}
        about = {"ranks": link.ranks, "gbit": link.gbit, "measured_gbit": rate, "sparsity": float(sparsity)}
        made.append(about | {"ratio": ratio, "median": middle} | facts)
    return made


def missed(row: dict[str, Any]) -> bool:
    if row["sparsity"] == 0.75 and row["gbit"] == 1:
        return any(row["ratio"][key].median < goal for key, goal in GOALS.items())
    return row["ratio"]["step"].median < LEAST


def predicted(row: dict[str, Any], rows: Sequence[dict[str, Any]]) -> list[float]:
    """Seconds in collectives, whole and packed; empty for an unshaped row, or without one among `rows` to take the host's share from."""
    same = [other for other in rows if other["gbit"] == 0 and all(other[key] == row[key] for key in ("ranks", "sparsity", "parameters"))]
    if not same or row["gbit"] == 0:
        return []

    def on_link(one: dict[str, Any], way: str) -> float:
        return 8 * one["median"][way]["counted"] / (1e9 * one["measured_gbit"][1])

    host = {way: same[0]["median"][way]["communication"] - on_link(same[0], way) for way in row["median"]}
    return [on_link(row, way) + host[way] for way in ("whole", "packed")]


def report(rows: Sequence[dict[str, Any]]) -> str:
    lines = []
    for row in rows:
        whole, packed = row["median"]["whole"], row["median"]["packed"]
        alone, together = row["measured_gbit"]
        rate = f"{row['gbit']:g} Gbit/s" if row["gbit"] else "unshaped"
        follow = statistics.median(row["follow"]) if row["follow"] else None
        lines.append(
            (
                f"{row['ranks']} ranks, {rate}, {100 * row['sparsity']:g} %",
                f"{alone:.2f}, {together:.2f}",
                f"{whole['step']:.2f} : {packed['step']:.2f}",
                row["ratio"]["step"],
                f"{whole['communication']:.2f} : {packed['communication']:.2f}",
                row["ratio"]["communication"],
                " : ".join(f"{seconds:.2f}" for seconds in predicted(row, rows)),
                f"{whole['interface'] / 1e6:,.0f} : {packed['interface'] / 1e6:,.0f}",
                f"{row['ratio']['interface'].median:.2f}",
                "" if follow is None else f"{follow:.2f}",
                "MISSED" if missed(row) else "",
            )
        )
    columns = (
        "",
        "Gbit/s, one sends, all send",
        "step, s",
        "whole / packed",
        "in collectives, s",
        "whole / packed",
        "predicted, s",
        "MB out",
        "whole / packed",
        "new masks, s",
        "",
    )
    return table(columns, lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.wire", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--rates", type=float, nargs="+", default=[1, 2.5, 5, 10, 0], help="Gbit/s of every rank's link; 0: unshaped")
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.5, 0.75, 0.9])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, default=STACK.layers)
    parser.add_argument("--tokens", type=int, default=STACK.tokens, help="of a rank in a step: with more, computing takes longer")
    parser.add_argument("--whole-model", action="store_true", help="also GPT-2 Small, vocabulary and all, 2 ranks unshaped at 75 %%")
    parser.add_argument("--layouts", action="store_true", help="only the seconds to make the layouts of GPT-2 Small, of --ranks")
    parser.add_argument("--throttle", action="store_true", help="throttle the process group instead of shaping links; needs no root")
    parser.add_argument("--out", type=Path, help="folder for wire_<hardware>_<date>.{json,md}")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    size = replace(STACK, layers=args.layers, tokens=args.tokens)
    if args.worker:
        worker(args.sparsities, args.rounds, WHOLE_MODEL if args.whole_model else size, args.rates[0] if args.throttle else None)
        return 0
    if args.layouts:
        print(table(["ranks", "seconds to make the layouts"], [[ranks, f"{layouts(ranks):.2f}"] for ranks in args.ranks]))
        return 0
    words = ["--sparsities", *map(str, args.sparsities), "--rounds", str(args.rounds)]
    words += ["--layers", str(args.layers), "--tokens", str(args.tokens)]
    if not args.throttle and (reason := refusal()) is not None:
        print(f"No links can be shaped here, so the process group is throttled. {reason}", file=sys.stderr)
        args.throttle = True
    how = " (process group throttled in process, no links; MB are counted)" if args.throttle else ""
    links, rows = [Link(ranks, gbit, args.throttle) for ranks in args.ranks for gbit in args.rates], []
    for link in tqdm(links, desc="links"):
        rows += rows_of(link, launch(link, words))
    tables = [f"## A stack of {size.layers} blocks of width {size.width}, {size.tokens} tokens a rank{how}\n\n{report(rows)}"]
    if args.whole_model:
        link = Link(2, 0, args.throttle)
        whole = rows_of(link, launch(link, ["--sparsities", "0.75", "--rounds", "3", "--whole-model"]))
        tables.append(f"## GPT-2 Small, {whole[0]['parameters']:,} parameters{how}\n\n{report(whole)}")
        rows += whole
    print("\n".join(tables))
    if args.out:
        print(write(args.out, "wire", {"goals": GOALS, "throttled": args.throttle, "rows": rows}, tables))
    return int(any(map(missed, rows)))


if __name__ == "__main__":
    sys.exit(main())
