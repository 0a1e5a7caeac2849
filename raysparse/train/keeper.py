"""One rank's part in the history of the topology: it selects with the other ranks, votes, and swaps in what was committed.

The ranks select, the manager (`sparsity.manager`) decides and audits. Rank 0 speaks to it; its answers reach the others over a
group of their own. Nothing is trained on masks that the manager has not committed: weights, moments and masks are touched only
after its verdict, and any other verdict ends the run.
"""

import json
import math
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from raysparse.kernels.adamw import MOMENTS
from raysparse.sparsity.agenda import Agenda, TopologyUpdate
from raysparse.sparsity.evolve import Proposal, propose
from raysparse.sparsity.manager import Verdict
from raysparse.sparsity.topology import Topology
from raysparse.sparsity.vote import Vote
from raysparse.train.error import TrainingError
from raysparse.train.optimizer import dense_moments, set_masks
from raysparse.train.run import Manager
from raysparse.train.shard import Sharded

CONTROL_TIMEOUT = timedelta(minutes=30)
"""Of the keepers' own group: rank 0 may wait for a manager that is being restarted, or read a journal."""


STORAGE_PATIENCE_S = 120.0
"""How long an update waits for a journal that cannot be written."""


@dataclass(frozen=True)
class Change:
    """What an update did, for logs.

    Attributes:
        churn: share of the live weights that were dead before it.
        explored: share of the sparse weights that were ever alive (ITOP, arXiv:2102.02887).
        seconds: it took on this rank, the vote included.
        skipped: why nothing was changed, or None.
    """

    update: TopologyUpdate
    churn: float
    explored: float
    seconds: float
    skipped: str | None


class Keeper:
    """Keeps the topology of a run on one rank.

    Attributes:
        agenda: what happens when.
        topology: this rank's rows of the masks.
        live: live weights of each layer over all ranks.
        keeps_moments: whether dead weights may have moments in some phase of this run.
    """

    def __init__(self, agenda: Agenda, topology: Topology, sharded: Sharded, optimizer: Optimizer, manager: Callable[[], Manager]):
        self.agenda, self.topology = agenda, topology
        self.live: dict[str, int] = {}
        self.keeps_moments = agenda.keeps_moments
        self._sharded, self._optimizer = sharded, optimizer
        self._group = cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=CONTROL_TIMEOUT))
        self._manager = manager() if dist.get_rank() == 0 else None
        self._attempt = 0
        self._sums = torch.zeros(0, dtype=torch.int64)  # digests of this rank's rows of the masks, as they were set
        self._checks = self._sums  # their `Topology.checksums`
        self._lines: list[str] = []  # of the journal, as far as this attempt has asked: all of it each time would leave holes in memory
        self._told = False  # the optimizer knows the masks

    def begin(self, step: int, history: str) -> None:
        """Have the topology that the run starts or goes on with checked; every rank calls this after loading.

        Args:
            step: the next one (0-based).
            history: what the checkpoint knows of earlier versions (`MaskManager.text`), should the journal be gone; only rank 0's counts.
        """
        self.count()
        agendas: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(agendas, self.agenda.digest(), group=self._group)
        if odd := [rank for rank, digest in enumerate(agendas) if digest != agendas[0]]:
            raise TrainingError(
                f"Expected the same config, shapes and seed on every rank. Got others than rank 0's on ranks {odd}. "
                "Install the same raysparse on every node and start again."
            )
        votes = self._gather(self._sums, self._sums, self._sums, self.topology.masks, {})
        agenda, version = self.agenda.model_dump(mode="json"), self.agenda.version(step)
        nonce, world_size = secrets.token_hex(8), dist.get_world_size()
        self._attempt = self._agreed(lambda manager: manager.begin(nonce, agenda, world_size, version, votes, history)).attempt
        self._lines = [] if self._manager is None else history.splitlines(keepends=True)[: version + 1]

    def evolve(self, step: int, gradients: Mapping[str, Tensor]) -> Change | None:
        """Carry out the update of a step; None where it has none.

        Args:
            gradients: name -> this rank's rows of the gradient of the mean loss over the global batch, dense: as it is after
                the reduction of the last micro-batch, before masking and clipping.

        Raises:
            TrainingError: the manager did not commit. Nothing was changed.
        """
        if not self.agenda.is_update(step):
            return None
        began = time.perf_counter()
        rule, names = self.agenda.span(step).rule, list(self.topology.masks)
        update: TopologyUpdate = self._from_manager(lambda manager: manager.decide(step))
        values = {name: self._sharded.parts[name].local.detach() for name in names}
        if not rule.grows_by_gradient:
            self.topology.kill(gradients)  # what grows has none yet, whether or not kernels and collectives have made it
        dense = self._sharded.spread(gradients, names) if rule.reads_gradient else {}
        skipped = self._not_finite(dense)
        if skipped:
            proposal = Proposal(self.topology.masks, {}, {})
        else:
            proposal = propose(self.agenda, update, self.topology, self.live, values, dense, self._sharded.ranks)
        before, after = self.topology.digest_sums(), self.topology.digest_sums(proposal.masks)
        expected = before - self.topology.digest_sums(proposal.dropped) + self.topology.digest_sums(proposal.grown)
        born = {name: proposal.masks[name] & ~self.topology.masks[name] for name in proposal.grown}
        votes = self._gather(before, expected, after, proposal.masks, born)
        seconds = time.perf_counter() - began
        self._agreed(lambda manager: _patiently(lambda: manager.commit(self._attempt, update.version, step, votes, seconds, skipped)))
        if not skipped:
            self._swap(proposal, values, rule.resets_state)
            self.live, self._sums, self._checks = dict(update.nnz), after, self.topology.checksums()
        replica = [vote for vote in votes if vote.replica == 0]
        churn = sum(sum(vote.changed) for vote in replica) / sum(self.live.values())
        explored = sum(sum(vote.ever) for vote in replica) / sum(map(math.prod, self.topology.shapes.values()))
        return Change(update, churn, explored, time.perf_counter() - began, skipped)

    def count(self) -> None:
        """Count the live weights anew, after other masks were loaded; every rank calls this."""
        self.live, self._sums = self.topology.nnz(self._sharded.ranks), self.topology.digest_sums()
        self._checks = self.topology.checksums()
        self._told = set_masks(self._sharded, self._optimizer, self.topology)

    def audit(self) -> None:
        """Are the masks in memory those that were set? Between updates nothing else looks. Every rank calls this.

        Raises:
            TrainingError: on every rank, if any rank's are not.
        """
        now = self.topology.checksums()
        wrong = [name for name, a, b in zip(self.topology.masks, self._checks.tolist(), now.tolist(), strict=True) if a != b]
        found: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(found, wrong, group=self._group)
        if bad := [f"rank {rank}'s of {', '.join(names[:3])}" for rank, names in enumerate(found) if names]:
            raise TrainingError(
                f"Expected the masks in memory as they were set. Got others, {'; '.join(bad[:8])}: something else has written there. "
                "Nothing of it is saved. The same command goes on from the last checkpoint; if it happens again, look at the memory of "
                "these machines."
            )

    def settle(self) -> None:
        """After an optimizer step: dead weights that were moved by their moments are 0 again."""
        if self.keeps_moments and not self._told:
            self.topology.kill(self._sharded.local)

    def published(self, checkpoint: str, step: int) -> None:
        """Tell the manager that a checkpoint of `step` holds the masks of its version."""
        if self._manager is not None:
            self._manager.published(self._attempt, self.agenda.version(step), checkpoint)

    def journal(self, step: int) -> Iterator[str]:
        """The history up to `step` as a journal that `MaskManager` reads, to lie in a checkpoint, line by line; empty on other ranks than
        0."""
        if self._manager is None:
            return
        agenda = self.agenda.model_dump(mode="json")
        header = {"attempt": self._attempt, "nonce": "", "world_size": dist.get_world_size(), "agenda": agenda, "published": {}}
        stop = self.agenda.version(step) + 1
        if len(self._lines) < stop:
            self._lines += self._manager.text(len(self._lines), stop).splitlines(keepends=True)
        yield json.dumps(header) + "\n"
        yield from self._lines[:stop]

    def history(self) -> list[dict[str, Any]]:
        """The committed versions, oldest first; empty on other ranks than 0."""
        return [] if self._manager is None else self._manager.history()

    def _not_finite(self, gradients: Mapping[str, Tensor]) -> str | None:
        """Why the gradients cannot say who grows, the same on every rank; None where they can."""
        bad = torch.tensor([int(not gradient.isfinite().all()) for gradient in gradients.values()], dtype=torch.int64)
        found = self._sharded.ranks.sum(bad).tolist() if gradients else []
        names = [name for name, count in zip(gradients, found, strict=True) if count]
        return f"the gradient of {', '.join(names[:3])} is not finite" if names else None

    def _swap(self, proposal: Proposal, values: Mapping[str, Tensor], resets_state: bool) -> None:
        """New masks; what they leave out is zeroed. Grown weights are zero and, unless kept, so are their moments."""
        before = self.topology.masks
        self.topology.evolve(proposal.masks)
        self.topology.kill(values)
        self._told = set_masks(self._sharded, self._optimizer, self.topology)
        if resets_state:
            for which in MOMENTS:
                found = dense_moments(self._sharded, self._optimizer, which, self.topology)
                self.topology.kill(found)
                for name in before.keys() & found.keys() if self.keeps_moments else ():  # of a phase that kept them
                    found[name].masked_fill_(proposal.masks[name] & ~before[name], 0.0)

    def _gather(
        self, before: Tensor, expected: Tensor, after: Tensor, masks: Mapping[str, Tensor], born: Mapping[str, Tensor]
    ) -> list[Vote]:
        """The votes of all ranks, on every rank."""
        names = list(self.topology.masks)
        ever = self.topology.ever
        vote = Vote(
            rank=dist.get_rank(),
            replica=self._sharded.replica,
            nnz=tuple(int(masks[name].sum()) for name in names),
            before=tuple(before.tolist()),
            expected=tuple(expected.tolist()),
            after=tuple(after.tolist()),
            ever=tuple(int((ever[name] | born[name] if name in born else ever[name]).sum()) for name in names),
            changed=tuple(int(born[name].sum()) if name in born else 0 for name in names),
        )
        votes: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(votes, vote, group=self._group)
        return votes

    def _from_manager(self, ask: Callable[[Manager], Any]) -> Any:
        """Rank 0's answer, on every rank."""
        box = [None if self._manager is None else ask(self._manager)]
        dist.broadcast_object_list(box, src=0, group=self._group)
        return box[0]

    def _agreed(self, ask: Callable[[Manager], Verdict]) -> Verdict:
        verdict: Verdict = self._from_manager(ask)
        if not verdict.ok:
            raise TrainingError(verdict.why)
        return verdict


def _patiently(ask: Callable[[], Verdict]) -> Verdict:
    """The verdict, asked for again while the journal's storage is full or away. Training waits: no version is trained on before."""
    deadline = time.monotonic() + STORAGE_PATIENCE_S
    while (verdict := ask()).later and time.monotonic() < deadline:
        time.sleep(1.0)
    return verdict
