"""The control plane of a topology: decides every update, audits that the ranks agree on the masks, remembers what was committed.

No tensor comes here. The ranks gather their votes among themselves and rank 0 alone speaks to the manager: one call an update,
however many ranks there are. It knows nothing of where it runs: in rank 0's own process, or in an actor that may be killed at any
moment, for the journal is the truth and memory a cache of it.

An attempt is one start of a group of ranks. Whoever begins one fences those before it: what their ranks, half dead perhaps, still
want to commit is refused. The masks of a group that goes on from a checkpoint need not become those of the group before it
(gradients are summed in another order on other ranks), so beginning rolls the history back to the checkpoint's version.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from raysparse.sparsity.agenda import Agenda, TopologyUpdate
from raysparse.sparsity.journal import Journal, Records, line
from raysparse.sparsity.vote import Vote, digest, replicas, totals, unfaithful, wrong_digest, wrong_nnz

log = logging.getLogger(__name__)

AGAIN = "Nothing was changed. The same command goes on from the last checkpoint; if it happens again, look at the machines of these ranks."


@dataclass(frozen=True)
class Verdict:
    """The manager's answer to who wants to change something.

    Attributes:
        ok: whether it is committed. If not, nothing is, and nothing may be trained on it.
        attempt: the current one, to be named in every later call.
        why: if not ok, what was expected, what was found and what to do.
        later: if not ok, whether the same call may succeed yet: the journal could not be written.
    """

    ok: bool
    attempt: int
    why: str = ""
    later: bool = False


class MaskManager:
    """Decides and audits; everything it was told before is read from `journal`, if that exists.

    Records of versions, in the journal, in checkpoints and as `history` gives them, are JSON objects: version, step (0-based; its
    update made the version), phase, nnz (of each layer), sparsity, churn (share of the live weights that were dead before),
    explored (share of the sparse weights that were ever alive: ITOP, arXiv:2102.02887), drop_fraction, seconds, skipped (why the
    update changed nothing, or null), digest and digests (one a layer). Version 0 is the topology that the run began with.

    Raises:
        ConfigError: `journal` is something else.
    """

    def __init__(self, journal: Path):
        self._journal = Journal(journal)
        header = self._journal.header
        self._agenda = Agenda.check(header["agenda"]) if header else None

    def begin(
        self,
        nonce: str,
        agenda: dict[str, Any],
        world_size: int,
        version: int,
        votes: Sequence[Vote],
        history: str,
    ) -> Verdict:
        """A group of ranks starts, at a loaded or the first topology: check it, fence earlier groups, roll back to it.

        Args:
            nonce: of this start; the same one again gets the same answer, for calls may be repeated.
            agenda: as JSON.
            version: of the topology that was loaded; 0 also of one that was just made.
            votes: what the ranks hold, in their order.
            history: what the checkpoint knows, as `text` gives it; used where the journal, lost perhaps, knows less.
        """
        if nonce == self._journal.header.get("nonce"):
            return Verdict(True, self._attempt)
        _check_votes(votes, world_size)
        decides = Agenda.check(agenda)
        known = self._journal.records if len(self._journal.records) > version else Records.of(history)
        records = known[: version + 1]
        if version and version >= len(records):
            return self._refuse(
                f"Expected the history of the topology up to version {version}, which the checkpoint holds, in it or in "
                f"{self._journal.path}. Got {len(records)} versions. Restore {self._journal.path.name} or the checkpoint from a copy."
            )
        last = records[version] if version < len(records) else None
        if (problem := _of_start(votes, decides, version, last)) is not None:
            return self._refuse(
                f"Expected the masks of version {version} as they were committed. Got {problem}. The checkpoint and "
                f"{self._journal.path} are of different runs, or one was changed: restore it, or choose another run.name."
            )
        if last is None:
            first = TopologyUpdate(0, 0, decides.span(0).phase.name, decides.plan(0), 0.0, decides.seed)  # as if an update had made it
            records = Records([line(_record(decides, first, first.nnz, votes, 0.0, None))])
        published = {v: path for v, path in self._journal.header.get("published", {}).items() if int(v) <= version}
        header = {"attempt": self._attempt + 1, "nonce": nonce, "world_size": world_size, "agenda": agenda, "published": published}
        self._journal.replace(header, records)
        self._agenda = decides
        return Verdict(True, self._attempt)

    def decide(self, step: int) -> TopologyUpdate:
        """What happens in a step that has an update; the same answer for the same step, whoever asks and however often."""
        assert self._agenda is not None, "decide before begin"
        return self._agenda.decide(step)

    def commit(self, attempt: int, version: int, step: int, votes: Sequence[Vote], seconds: float, skipped: str | None) -> Verdict:
        """May the ranks train on these masks? A version that is ok is on the disk when this returns; else nothing has changed.

        Args:
            seconds: the update took until now.
            skipped: why it changes nothing, or None.
        """
        try:
            return self._commit(attempt, version, step, votes, seconds, skipped)
        except OSError as error:
            why = (
                f"Expected to write version {version} of the topology to {self._journal.path}. Got: {error}. "
                f"Make room there, or mend the storage. {AGAIN}"
            )
            return Verdict(False, attempt, why, later=True)

    def _commit(self, attempt: int, version: int, step: int, votes: Sequence[Vote], seconds: float, skipped: str | None) -> Verdict:
        if (stale := self._fenced(attempt)) is not None:
            return stale
        _check_votes(votes, self._journal.header["world_size"])
        if version < len(self._journal.records):
            return self._repeated(version, votes, skipped)
        assert self._agenda is not None
        update, last = self.decide(step), self._journal.records[-1]
        assert update.version == version == len(self._journal.records), (update, version, len(self._journal.records))
        nnz = last["nnz"] if skipped else update.nnz
        if (problem := _of_update(votes, self._agenda, version, last, nnz, skipped)) is not None:
            return self._refuse(f"{problem}. {AGAIN}")
        written = self._journal.append(_record(self._agenda, update, nnz, votes, seconds, skipped))
        return Verdict(True, attempt) if written else self._stale(attempt)

    def published(self, attempt: int, version: int, checkpoint: str) -> None:
        """A checkpoint that holds a version is complete. Of a fenced attempt it is no news."""
        journal = self._journal
        try:
            if self._fenced(attempt) is None:
                found = journal.header["published"] | {str(version): checkpoint}
                journal.replace(journal.header | {"published": found}, journal.records)
        except OSError as error:  # nothing rests on it
            log.warning("%s could not be written (%s): it does not name %s.", journal.path, error, checkpoint)

    def history(self) -> list[dict[str, Any]]:
        """The records of all committed versions, oldest first."""
        return list(self._journal.records)

    def text(self, first: int = 0, stop: int | None = None) -> str:
        """The records of versions `first` to `stop` - 1 as they stand in the journal, a line each."""
        return self._journal.records[first:stop].text

    def view(self, last: int = 20) -> dict[str, Any]:
        """Where the topology is, as plain data.

        Args:
            last: how many of the newest records, without what they say of single layers.
        """
        agenda, records, header = self._agenda, self._journal.records, self._journal.header
        if agenda is None:
            return {"attempt": 0}
        now, planned = records[-1], agenda.plan(records[-1]["version"])
        published = header["published"]
        newest = max(published, key=int, default=None)
        layers = [
            {"name": name, "shape": list(shape), "nnz": now["nnz"][name], "planned": planned[name]} for name, shape in agenda.shapes.items()
        ]
        return {
            "attempt": header["attempt"],
            "world_size": header["world_size"],
            "steps": agenda.steps,
            "updates": len(agenda.update_steps),
            "published": None if newest is None else {"version": int(newest), "checkpoint": published[newest]},
            "now": _brief(now) | {"digest": now["digest"]},
            "layers": layers,
            "last": [_brief(record) for record in records[max(0, len(records) - last) :]],
        }

    @property
    def _attempt(self) -> int:
        return self._journal.header.get("attempt", 0)

    def _refuse(self, why: str) -> Verdict:
        return Verdict(False, self._attempt, why)

    def _fenced(self, attempt: int) -> Verdict | None:
        """What an attempt that is no longer the current one is told."""
        return None if attempt == self._attempt and self._journal.owned else self._stale(attempt)

    def _stale(self, attempt: int) -> Verdict:
        return self._refuse(
            f"Expected attempt {attempt} to be the current one of {self._journal.path.parent}. Got another that began after it, and "
            "goes on. Nothing to do."
        )

    def _repeated(self, version: int, votes: Sequence[Vote], skipped: str | None) -> Verdict:
        """Of a version that is committed: the answer got lost, or somebody wants to change what is history."""
        assert self._agenda is not None
        record, names = self._journal.records[version], tuple(self._agenda.shapes)
        problem = wrong_digest(votes, lambda vote: vote.after, names, record["digests"])
        if problem is None and record["skipped"] == skipped:
            return Verdict(True, self._attempt)
        return self._refuse(f"Expected version {version} as it is committed already. Got {problem or f'skipped: {skipped}'}. {AGAIN}")


def _check_votes(votes: Sequence[Vote], world_size: int) -> None:
    assert [vote.rank for vote in votes] == list(range(world_size)), [vote.rank for vote in votes]


def _of_start(votes: Sequence[Vote], agenda: Agenda, version: int, record: Mapping[str, Any] | None) -> str | None:
    """What is wrong with the masks that a group starts with."""
    names = tuple(agenda.shapes)
    planned = agenda.plan(version) if record is None or not record["skipped"] else record["nnz"]
    return wrong_nnz(votes, names, [planned[name] for name in names]) or wrong_digest(
        votes, lambda vote: vote.after, names, None if record is None else record["digests"]
    )


def _of_update(
    votes: Sequence[Vote], agenda: Agenda, version: int, last: Mapping[str, Any], nnz: Mapping[str, int], skipped: str | None
) -> str | None:
    """What is wrong with an update of the masks of `last`."""
    names = tuple(agenda.shapes)
    if problem := wrong_digest(votes, lambda vote: vote.before, names, last["digests"]):
        return f"Expected the masks of version {version - 1} unchanged since they were committed. Got {problem}"
    if problem := unfaithful(votes, names):
        return f"Expected the masks of version {version} to be the last ones, the dropped gone, the grown there. Got {problem}"
    if problem := wrong_nnz(votes, names, [nnz[name] for name in names]):
        return f"Expected as many live weights in version {version} as planned. Got {problem}"
    if problem := wrong_digest(votes, lambda vote: vote.after, names, last["digests"] if skipped else None):
        return f"Expected equal masks of version {version} {'and the one before it' if skipped else 'on all replicas'}. Got {problem}"
    return None


def _record(
    agenda: Agenda, update: TopologyUpdate, nnz: Mapping[str, int], votes: Sequence[Vote], seconds: float, skipped: str | None
) -> dict[str, Any]:
    whole = next(iter(replicas(votes).values()))
    sums, live, size = totals(whole, lambda vote: vote.after), sum(nnz.values()), sum(map(prod, agenda.shapes.values()))
    changed, ever = (sum(sum(numbers) for numbers in found) for found in ((v.changed for v in whole), (v.ever for v in whole)))
    return {
        "version": update.version,
        "step": update.step,
        "phase": update.phase,
        "nnz": {name: nnz[name] for name in agenda.shapes},
        "sparsity": 1 - live / size,
        "churn": changed / live if live else 0.0,
        "explored": ever / size,
        "drop_fraction": update.drop_fraction,
        "seconds": seconds,
        "skipped": skipped,
        "digest": digest(agenda.shapes, sums),
        "digests": list(sums),
    }


def _brief(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record without what it says of single layers."""
    return {key: value for key, value in record.items() if key not in ("nnz", "digest", "digests")}
