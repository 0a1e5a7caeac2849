"""How a run lies on its ranks: whose rows of the batch are whose, and on which machines the ranks are that share a model."""

from collections import Counter
from collections.abc import Sequence

from raysparse.train.shard import ShardingConfig


def share_of(sequences: int, rank: int, world_size: int) -> range:
    """A rank's rows of the global batch, in the order of the ranks; the first ones have one more where the ranks do not divide it.

    Any split is exact: each rank divides its sum of losses by the predicted tokens of the whole batch, and gradients are summed.
    """
    least, more = divmod(sequences, world_size)
    first = rank * least + min(rank, more)
    return range(first, first + least + (rank < more))


def largest_share(sequences: int, world_size: int) -> int:
    """Rows of the first rank, and of any other that as many fall to."""
    return len(share_of(sequences, 0, world_size))


def show_shares(sequences: int, world_size: int) -> str:
    """Who has how many rows, in a few words."""
    counts = Counter(len(share_of(sequences, rank, world_size)) for rank in range(world_size))
    each = " and ".join(f"{number} x {rows}" for rows, number in counts.items()) if len(counts) > 1 else f"{max(counts)} each"
    return f"{world_size} worker{'s share' if world_size > 1 else ' shares'} {sequences} sequences: {each}"


def scattered(config: ShardingConfig, nodes: Sequence[str]) -> str | None:
    """What to say where weights are gathered between machines although there are replicas (HSDP) to keep that within one; else None.

    Args:
        nodes: of each rank. Shard groups are of neighbouring ranks; Ray Train and torchrun number the ranks machine by machine.
    """
    size = len(nodes) // config.replicas
    groups = [nodes[first : first + size] for first in range(0, len(nodes), size)]
    spanning = sum(len(set(group)) > 1 for group in groups)
    if config.replicas == 1 or not spanning:
        return None
    found = ", ".join(f"{number} on {node}" for node, number in Counter(nodes).items())
    return (
        f"sharding: {spanning} of {config.replicas} replicas lie on several machines ({found}), so weights are gathered between them in "
        f"every step. To keep that inside a machine let each hold a multiple of {size} workers (ray start --num-cpus, --num-gpus), or "
        "change sharding.replicas."
    )
