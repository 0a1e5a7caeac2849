"""Gloo ranks without Ray: a fork server that has torch loaded starts a rank in about 0.1 s."""

import pickle
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

_CONTEXT: Any = None


def spawn(function: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 240.0) -> list[Any]:
    """``function(*args)`` on each of `world_size` gloo ranks, one thread each; returns their results, rank 0 first.

    `function` must be importable (a module's top level). A rank that raises fails the call with its traceback.
    """
    global _CONTEXT
    if _CONTEXT is None:
        _CONTEXT = mp.get_context("forkserver")
        _CONTEXT.set_forkserver_preload(
            [
                "torch",
                "torch.distributed.fsdp",
                "torch.distributed.checkpoint",
                "transformers.models.gpt2.modeling_gpt2",
                "raysparse.recipes",
            ]
        )
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # on a port that nobody else can take meanwhile
    queue = _CONTEXT.Queue()
    ranks = [_CONTEXT.Process(target=_rank, args=(r, world_size, store.port, function, args, queue)) for r in range(world_size)]
    for rank in ranks:
        rank.start()
    try:
        results = {rank: pickle.loads(data) for rank, data in (queue.get(timeout=timeout_s) for _ in ranks)}
    finally:
        for rank in ranks:
            rank.join(10)
            if rank.is_alive():
                rank.kill()
    failures = [f"rank {rank} of {world_size}:\n{result.text}" for rank, result in results.items() if isinstance(result, _Failure)]
    if failures:
        raise AssertionError("\n".join(failures))  # in the order in which they failed: the first is the cause
    return [results[rank] for rank in range(world_size)]


class _Failure:
    def __init__(self, text: str):
        self.text = text


def _rank(rank: int, world_size: int, port: int, function: Callable[..., Any], args: tuple[Any, ...], queue: Any) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(1234 + rank)  # nothing may depend on the global generator
    dist.init_process_group("gloo", store=dist.TCPStore("127.0.0.1", port, is_master=False), rank=rank, world_size=world_size)
    try:
        result = function(*args)
    except BaseException:
        result = _Failure(traceback.format_exc())
    queue.put((rank, pickle.dumps(result)))  # plain bytes: torch's own pickling would share memory of a process that ends
    dist.barrier() if not isinstance(result, _Failure) else None
    dist.destroy_process_group()
