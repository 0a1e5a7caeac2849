"""What a rank says of its masks at an update, and what the votes of all ranks say together.

A digest of a layer is the sum modulo 2^64 of a hash of the indices that live (`Topology.digest_sums`): those of the ranks that
share a weight add up to the whole weight's, and two sets of masks with equal digests are equal but for 1 chance in 2^64.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

Numbers = tuple[int, ...]
"""One for each layer, in the order of the agenda."""


@dataclass(frozen=True)
class Vote:
    """Of one rank, about its rows of every layer.

    Attributes:
        replica: which whole copy of the model its rows belong to.
        nnz: live weights after the update.
        before, after: digests of its masks before and after the update.
        expected: before - dropped + grown: what `after` must be, by what the selection chose and not by the new masks.
        ever: weights that are or were alive.
        changed: live weights that did not live before the update.
    """

    rank: int
    replica: int
    nnz: Numbers
    before: Numbers
    expected: Numbers
    after: Numbers
    ever: Numbers
    changed: Numbers


def digest(names: Iterable[str], sums: Iterable[int]) -> str:
    """Of all layers: 32 hex digits, `Topology.digest`'s of the same masks."""
    text = "\n".join(f"{name} {value}" for name, value in zip(names, sums, strict=True))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def totals(votes: Iterable[Vote], read: Callable[[Vote], Numbers]) -> Numbers:
    """The sum of what the ranks of one replica say, modulo 2^64, in [-2^63, 2^63)."""
    return tuple((sum(values) + (1 << 63)) % (1 << 64) - (1 << 63) for values in zip(*map(read, votes), strict=True))


def replicas(votes: Iterable[Vote]) -> dict[int, list[Vote]]:
    """Replica -> its votes, in the order that they have."""
    found: dict[int, list[Vote]] = {}
    for vote in votes:
        found.setdefault(vote.replica, []).append(vote)
    return found


def unfaithful(votes: Iterable[Vote], names: Sequence[str]) -> str | None:
    """Which ranks have other masks than their selection chose, or None."""
    wrong = [(vote.rank, vote.expected, vote.after) for vote in votes if vote.expected != vote.after]
    if not wrong:
        return None
    _, expected, after = wrong[0]
    return f"from {_ranks([rank for rank, _, _ in wrong])}, {_layers(names, expected, after, _hex)}"


def wrong_nnz(votes: Iterable[Vote], names: Sequence[str], wanted: Sequence[int]) -> str | None:
    """Which ranks hold how many live weights more or fewer than `wanted`, or None."""
    return _deviation(replicas(votes), lambda vote: vote.nnz, names, tuple(wanted), "{:,}".format)


def wrong_digest(votes: Iterable[Vote], read: Callable[[Vote], Numbers], names: Sequence[str], wanted: Sequence[int] | None) -> str | None:
    """Which ranks have other masks than `wanted`, where None stands for what most replicas have; or None."""
    groups = replicas(votes)
    if wanted is None:
        wanted, count = Counter(totals(group, read) for group in groups.values()).most_common(1)[0]
        if 2 * count <= len(groups):
            return _split(groups, read, names)
    return _deviation(groups, read, names, tuple(wanted), _hex)


def _deviation(
    groups: dict[int, list[Vote]], read: Callable[[Vote], Numbers], names: Sequence[str], wanted: Numbers, show: Callable[[int], str]
) -> str | None:
    found = {replica: totals(group, read) for replica, group in groups.items()}
    bad = [replica for replica, total in found.items() if total != wanted]
    if not bad:
        return None
    good = next((groups[replica] for replica in found if replica not in bad), None)
    ranks = sorted(rank for replica in bad for rank in _suspects(groups[replica], good, read))
    return f"from {_ranks(ranks)}, {_layers(names, wanted, found[bad[0]], show)}"


def _suspects(group: list[Vote], good: list[Vote] | None, read: Callable[[Vote], Numbers]) -> list[int]:
    """The ranks of a replica that differ from the rank with the same rows in a good one; all of them where there is none."""
    if good is None:
        return [vote.rank for vote in group]
    return [vote.rank for vote, other in zip(group, good, strict=True) if read(vote) != read(other)]


def _split(groups: dict[int, list[Vote]], read: Callable[[Vote], Numbers], names: Sequence[str]) -> str:
    """Replicas without a majority: who differs from the first one."""
    first, *others = groups.values()
    other = next(group for group in others if totals(group, read) != totals(first, read))
    ranks = sorted(_suspects(first, other, read) + _suspects(other, first, read))
    return f"from {_ranks(ranks)}, which disagree, {_layers(names, totals(first, read), totals(other, read), _hex)}"


def _ranks(ranks: Sequence[int]) -> str:
    shown = ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    return f"rank{'s' * (len(ranks) > 1)} {shown}"


def _layers(names: Sequence[str], wanted: Numbers, got: Numbers, show: Callable[[int], str]) -> str:
    wrong = [(name, w, g) for name, w, g in zip(names, wanted, got, strict=True) if w != g]
    shown = ", ".join(f"{show(g)} instead of {show(w)} in {name}" for name, w, g in wrong[:3])
    return shown + (f" and {len(wrong) - 3} more layers" if len(wrong) > 3 else "")


def _hex(value: int) -> str:
    return f"{value % (1 << 64):016x}"
