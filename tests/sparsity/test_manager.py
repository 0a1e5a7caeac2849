"""The mask manager: what it decides, what it commits, what it refuses and whom it names, and that it forgets nothing."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from raysparse.config import ConfigError
from raysparse.sparsity.agenda import Agenda
from raysparse.sparsity.manager import MaskManager, Vote
from raysparse.sparsity.ranks import ALONE
from raysparse.sparsity.topology import Rows, Topology

SHAPES = {"b.wide": (5, 9), "a.tall": (7, 4)}  # not in alphabetical order: the order of layers is the model's
AGENDA = Agenda.check(
    {
        "sparsity": {
            "target": 0.5,
            "evolution": {"type": "set", "update_interval": 4},
            "timeline": [{"name": "rise", "length": "50 %", "sparsity": {"type": "polynomial"}}, {"name": "hold", "length": "50 %"}],
        },
        "shapes": SHAPES,
        "steps": 40,
        "tokens_per_step": 1,
        "seed": 3,
    }
)
Masks = dict[str, Tensor]


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    return tmp_path / "topology.jsonl"


def masks_of(version: int, variant: int = 0) -> Masks:
    """Some masks with the live weights that the plan wants; `variant` gives others."""
    generator = torch.Generator().manual_seed(100 * version + variant)
    masks = {}
    for name, (rows, cols) in SHAPES.items():
        mask = torch.zeros(rows * cols, dtype=torch.bool)
        mask[torch.randperm(rows * cols, generator=generator)[: AGENDA.plan(version)[name]]] = True
        masks[name] = mask.view(rows, cols)
    return masks


def topology(masks: Masks, rank: int = 0, shards: int = 1) -> Topology:
    """The rows of one of `shards` ranks, as even as they go."""
    rows, here = {}, {}
    for name, (count, cols) in SHAPES.items():
        first, end = rank * count // shards, (rank + 1) * count // shards
        rows[name], here[name] = Rows(first, end - first, cols), masks[name][first:end]
    return Topology(SHAPES, rows, here)


def vote(old: Masks, new: Masks, rank: int = 0, shards: int = 1, replica: int = 0) -> Vote:
    """An honest rank's; ever: what lived in either."""
    before, after = topology(old, rank, shards), topology(new, rank, shards)
    dropped = {name: before.masks[name] & ~after.masks[name] for name in SHAPES}
    grown = {name: after.masks[name] & ~before.masks[name] for name in SHAPES}
    expected = before.digest_sums() - before.digest_sums(dropped) + before.digest_sums(grown)
    return Vote(
        rank=rank + replica * shards,
        replica=replica,
        nnz=tuple(int(mask.sum()) for mask in after.masks.values()),
        before=tuple(before.digest_sums().tolist()),
        expected=tuple(expected.tolist()),
        after=tuple(after.digest_sums().tolist()),
        ever=tuple(int((before.masks[name] | after.masks[name]).sum()) for name in SHAPES),
        changed=tuple(int(mask.sum()) for mask in grown.values()),
    )


def votes(old: Masks, new: Masks, shards: int = 2, replicas: int = 1) -> list[Vote]:
    return [vote(old, new, rank, shards, replica) for replica in range(replicas) for rank in range(shards)]


def begun(journal: Path, version: int = 0, nonce: str = "one", shards: int = 2, replicas: int = 1) -> MaskManager:
    """A manager whose first attempt, with the masks of `masks_of`, is ok and has committed `version` updates."""
    manager, masks = MaskManager(journal), masks_of(0)
    world = shards * replicas
    assert manager.begin(nonce, AGENDA.model_dump(mode="json"), world, 0, votes(masks, masks, shards, replicas), "").ok
    for v in range(1, version + 1):
        assert commit(manager, v, votes(masks_of(v - 1), masks_of(v), shards, replicas)).ok
    return manager


def begin(manager: MaskManager, version: int, masks: Masks, nonce: str = "two", history: str = ""):
    return manager.begin(nonce, AGENDA.model_dump(mode="json"), 2, version, votes(masks, masks), history)


def commit(manager: MaskManager, version: int, cast: list[Vote], skipped: str | None = None, attempt: int = 1):
    return manager.commit(attempt, version, AGENDA.update_steps[version - 1], cast, 0.25, skipped)


def lines(journal: Path) -> list[dict]:
    return [json.loads(line) for line in journal.read_text().splitlines()]


def refused(verdict, *parts: str) -> None:
    """It is not ok and says so in three parts, with these in them."""
    assert not verdict.ok
    for part in ("Expected", "Got", *parts):
        assert part in verdict.why, verdict.why


def test_importing_needs_no_torch():
    """The actor must start fast."""
    code = "import sys, raysparse.sparsity.manager; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_decides_as_the_agenda_does(journal):
    manager = begun(journal)
    again = MaskManager(journal)
    for step in AGENDA.update_steps:
        assert manager.decide(step) == again.decide(step) == AGENDA.decide(step)


@pytest.mark.parametrize(("shards", "replicas"), [(1, 1), (2, 1), (3, 1), (1, 2), (2, 3)])
def test_records(journal, shards, replicas):
    manager = begun(journal, 3, shards=shards, replicas=replicas)
    header, *records = lines(journal)
    assert header["attempt"] == 1
    assert header["world_size"] == shards * replicas
    assert Agenda.check(header["agenda"]) == AGENDA
    assert records == manager.history()
    assert [record["version"] for record in records] == [0, 1, 2, 3]
    old, new, size = masks_of(1), masks_of(2), 5 * 9 + 7 * 4
    live = sum(int(mask.sum()) for mask in new.values())
    grown = sum(int((new[name] & ~old[name]).sum()) for name in SHAPES)
    ever = sum(int((new[name] | old[name]).sum()) for name in SHAPES)
    assert records[2] == {
        "version": 2,
        "step": 8,
        "phase": "rise",
        "nnz": AGENDA.plan(2),
        "sparsity": 1 - live / size,
        "churn": grown / live,
        "explored": ever / size,
        "drop_fraction": AGENDA.decide(8).drop_fraction,
        "seconds": 0.25,
        "skipped": None,
        "digest": topology(new).digest(ALONE),
        "digests": topology(new).digest_sums().tolist(),
    }
    assert list(records[2]["nnz"]) == list(SHAPES)
    assert records[0]["digest"] == topology(masks_of(0)).digest(ALONE)
    assert (records[0]["churn"], records[0]["drop_fraction"], records[0]["phase"]) == (0.0, 0.0, "rise")


def test_a_new_manager_knows_what_the_old_one_did(journal):
    old = begun(journal, 3)
    old.published(1, 2, "checkpoints/step_9")
    new = MaskManager(journal)
    assert new.history() == old.history()
    assert new.view() == old.view()
    assert commit(new, 4, votes(masks_of(3), masks_of(4))).ok
    assert [record["version"] for record in lines(journal)[1:]] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("torn", [b"{", b'{"version": 3, "step": 12, "phase": "rise", "nnz"' + b" " * 3000, b"\0" * 50])
def test_a_torn_last_line_was_never_written(journal, torn):
    whole = begun(journal, 2).history()
    with journal.open("ab") as stream:
        stream.write(torn)
    manager = MaskManager(journal)
    assert manager.history() == whole
    assert commit(manager, 3, votes(masks_of(2), masks_of(3))).ok
    assert lines(journal)[1:] == manager.history()
    assert len(manager.history()) == 4


def test_a_full_disk_is_an_error_and_changes_nothing(journal, monkeypatch):
    manager = begun(journal, 1)
    content, history = journal.read_bytes(), manager.history()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        verdict = commit(manager, 2, votes(masks_of(1), masks_of(2)))
        assert (verdict.ok, verdict.later) == (False, True)
        expected = f"Expected to write version 2 of the topology to {journal}. Got: [Errno 28] No space left on device. Make room there, "
        assert verdict.why.startswith(expected)
        assert manager.history() == history
        whole = journal.read_bytes()
        with pytest.raises(OSError, match="No space left"):
            begin(manager, 1, masks_of(1))
        assert journal.read_bytes() == whole
        assert list(journal.parent.iterdir()) == [journal]
    assert commit(manager, 2, votes(masks_of(1), masks_of(2, variant=1))).ok  # in the place of what was half written
    assert journal.read_bytes().startswith(content)
    assert lines(journal)[1:] == manager.history()


def test_a_deleted_journal_is_not_begun_in_the_middle(journal):
    manager = begun(journal, 1)
    journal.unlink()
    verdict = commit(manager, 2, votes(masks_of(1), masks_of(2)))
    assert (verdict.ok, verdict.later) == (False, True)
    assert "No such file" in verdict.why
    assert not journal.exists()


def test_beginning_twice_is_beginning_once(journal):
    manager = begun(journal, 1)
    for same in (manager, MaskManager(journal)):
        verdict = begin(same, 0, masks_of(0), nonce="one")
        assert (verdict.ok, verdict.attempt) == (True, 1)
        assert len(same.history()) == 2  # nothing was rolled back


def test_a_commit_that_is_repeated(journal):
    manager = begun(journal, 3)
    content = journal.read_bytes()
    for same in (manager, MaskManager(journal)):
        assert commit(same, 3, votes(masks_of(2), masks_of(3))).ok
        assert commit(same, 2, votes(masks_of(1), masks_of(2))).ok
        refused(commit(same, 3, votes(masks_of(2), masks_of(3, variant=1))), "version 3 as it is committed already", "from ranks 0, 1, ")
        refused(commit(same, 3, votes(masks_of(2), masks_of(3)), skipped="no gradient"), "Got skipped: no gradient")
    assert journal.read_bytes() == content


def test_a_new_attempt_fences_the_ones_before(journal):
    manager = begun(journal, 2)
    verdict = begin(manager, 2, masks_of(2))
    assert (verdict.ok, verdict.attempt) == (True, 2)
    content = journal.read_bytes()
    late = commit(manager, 3, votes(masks_of(2), masks_of(3)), attempt=1)
    refused(late, "Expected attempt 1 to be the current one", "Nothing to do")
    assert late.attempt == 2
    manager.published(1, 2, "checkpoints/late")
    assert journal.read_bytes() == content
    assert commit(manager, 3, votes(masks_of(2), masks_of(3)), attempt=2).ok


def test_a_manager_in_another_process_fences_this_one(journal):
    old = begun(journal, 2)
    new = MaskManager(journal)
    assert begin(new, 1, masks_of(1)).ok
    content = journal.read_bytes()
    refused(commit(old, 3, votes(masks_of(2), masks_of(3))), "Expected attempt 1 to be the current one")
    old.published(1, 2, "checkpoints/late")
    assert journal.read_bytes() == content


def test_going_on_from_a_checkpoint_rolls_back_to_it(journal):
    manager = begun(journal, 4)
    manager.published(1, 1, "checkpoints/step_5")
    manager.published(1, 3, "checkpoints/step_13")
    first = manager.history()
    assert begin(manager, 1, masks_of(1)).ok
    assert manager.history() == first[:2] == lines(journal)[1:]
    assert manager.view()["published"] == {"version": 1, "checkpoint": "checkpoints/step_5"}
    assert commit(manager, 2, votes(masks_of(1), masks_of(2, variant=1)), attempt=2).ok  # others than before: summed in another order
    assert manager.history()[2]["digest"] != first[2]["digest"]


def test_a_deleted_journal_comes_back_from_the_checkpoint(journal):
    before = begun(journal, 3)
    history, text = before.history(), before.text()
    journal.unlink()
    manager = MaskManager(journal)
    refused(begin(manager, 3, masks_of(3)), "the history of the topology up to version 3", "Got 0 versions")
    assert not journal.exists()
    assert begin(manager, 3, masks_of(3), history=text).ok
    assert manager.history() == history == lines(journal)[1:]


def test_a_copy_in_the_place_of_the_journal_is_gone_on_with(journal):
    """Restored from a backup, say: what was known stays readable, what follows is written to the copy."""
    manager = begun(journal, 2)
    known, content = manager.history(), journal.read_bytes()
    journal.unlink()
    journal.write_bytes(content)
    assert manager.history() == known
    assert commit(manager, 3, votes(masks_of(2), masks_of(3))).ok
    assert manager.history() == lines(journal)[1:]
    assert len(manager.history()) == 4


def test_a_journal_that_lost_its_end_is_an_error_of_the_storage(journal):
    manager = begun(journal, 2)
    journal.write_bytes(journal.read_bytes()[:-40])
    with pytest.raises(OSError, match=r"Expected \d+ bytes of line 4\. Got \d+\."):
        manager.history()


def test_a_journal_behind_the_checkpoint_is_replaced_by_its_history(journal, tmp_path):
    old = begun(journal, 1)
    ahead = begun(tmp_path / "ahead.jsonl", 3)
    history = ahead.history()
    assert begin(old, 3, masks_of(3), history=ahead.text()).ok
    assert old.history() == history == lines(journal)[1:]


def test_other_masks_than_the_journal_has_are_not_gone_on_from(journal):
    manager = begun(journal, 2)
    content = journal.read_bytes()
    refused(begin(manager, 2, masks_of(2, variant=1)), "the masks of version 2 as they were committed", "from ranks 0, 1, ", "b.wide")
    refused(begin(manager, 2, masks_of(1)), "instead of", "in b.wide")
    assert journal.read_bytes() == content
    assert begin(manager, 2, masks_of(2)).ok


def test_first_masks_must_be_planned(journal):
    refused(begin(MaskManager(journal), 0, masks_of(5)), f"instead of {AGENDA.plan(0)['b.wide']} in b.wide")
    assert not journal.exists()


def test_a_skipped_update(journal):
    manager, masks, why = begun(journal, 1), masks_of(1), "the gradient of b.wide is not finite"
    assert AGENDA.plan(2) != AGENDA.plan(1)
    refused(commit(manager, 2, votes(masks, masks)), "as many live weights in version 2 as planned")
    assert commit(manager, 2, votes(masks, masks), skipped=why).ok
    record = manager.history()[2]
    assert record["skipped"] == why
    assert record["nnz"] == AGENDA.plan(1)
    assert record["digest"] == manager.history()[1]["digest"]
    assert record["churn"] == 0
    moved = votes(masks, moved_bit(masks))
    refused(commit(manager, 3, moved, skipped=why), "Expected equal masks of version 3 and the one before it", "from ranks 0")
    for same in (manager, MaskManager(journal)):
        assert begin(same, 2, masks, nonce="after").ok  # not what is planned, but what was committed
    assert commit(manager, 3, votes(masks, masks_of(3)), attempt=2).ok


def moved_bit(masks: Masks, layer: str = "b.wide", row: int = 0) -> Masks:
    """One live weight of a row is elsewhere in it: nnz is the same."""
    moved = {name: mask.clone() for name, mask in masks.items()}
    line = moved[layer][row]
    assert 0 < int(line.sum()) < len(line), "a row that is neither full nor empty"
    line[line.nonzero()[0]], line[(~masks[layer][row]).nonzero()[0]] = False, True
    return moved


def test_a_wrong_count_names_layer_and_ranks(journal):
    manager = begun(journal, 1)
    content, planned = journal.read_bytes(), AGENDA.plan(2)["a.tall"]
    one_more = {name: mask.clone() for name, mask in masks_of(2).items()}
    one_more["a.tall"].view(-1)[int((~one_more["a.tall"].flatten()).nonzero()[-1])] = True
    verdict = commit(manager, 2, votes(masks_of(1), one_more))
    refused(verdict, "as many live weights in version 2 as planned", f"from ranks 0, 1, {planned + 1} instead of {planned} in a.tall. ")
    assert "the last checkpoint" in verdict.why
    assert "b.wide" not in verdict.why
    assert journal.read_bytes() == content


def test_a_wrong_count_of_one_replica_names_its_rank(journal):
    manager = begun(journal, 1, replicas=2)
    cast = votes(masks_of(1), masks_of(2), replicas=2)
    cast[3] = replace(cast[3], nnz=(cast[3].nnz[0] - 1, cast[3].nnz[1]))
    refused(commit(manager, 2, cast), f"from rank 3, {AGENDA.plan(2)['b.wide'] - 1} instead of {AGENDA.plan(2)['b.wide']} in b.wide. ")


def test_a_moved_bit_of_a_single_replica(journal):
    """Only the selection knows better."""
    manager = begun(journal, 1)
    cast = votes(masks_of(1), masks_of(2))
    moved = vote(masks_of(1), moved_bit(masks_of(2), row=4), rank=1, shards=2)
    assert moved.nnz == cast[1].nnz
    cast[1] = replace(cast[1], after=moved.after)
    digests = f"{moved.after[0] % 2**64:016x} instead of {cast[1].expected[0] % 2**64:016x}"
    refused(commit(manager, 2, cast), "the last ones, the dropped gone, the grown there", f"from rank 1, {digests} in b.wide. ")
    assert commit(manager, 2, votes(masks_of(1), masks_of(2))).ok


def test_a_moved_bit_of_one_of_two_replicas(journal):
    """Their selections differ: nobody can say who is right."""
    manager = begun(journal, 1, replicas=2)
    cast = votes(masks_of(1), masks_of(2), replicas=2)
    cast[2] = vote(masks_of(1), moved_bit(masks_of(2)), rank=0, shards=2, replica=1)
    refused(commit(manager, 2, cast), "equal masks of version 2 on all replicas", "from ranks 0, 2, which disagree, ", "in b.wide. ")


def test_a_moved_bit_of_one_of_three_replicas(journal):
    manager = begun(journal, 1, replicas=3)
    cast = votes(masks_of(1), masks_of(2), replicas=3)
    cast[1] = vote(masks_of(1), moved_bit(masks_of(2), "a.tall", row=6), rank=1, shards=2)  # of the first replica
    refused(commit(manager, 2, cast), "equal masks of version 2 on all replicas", "from rank 1, ", "in a.tall. ")


@pytest.mark.parametrize(("replicas", "named"), [(1, "from ranks 0, 1, "), (2, "from rank 1, ")])
def test_masks_that_changed_after_they_were_committed(journal, replicas, named):
    manager = begun(journal, 1, replicas=replicas)
    cast = votes(masks_of(1), masks_of(2), replicas=replicas)
    cast[1] = vote(moved_bit(masks_of(1), row=3), masks_of(2), rank=1, shards=2)
    refused(commit(manager, 2, cast), "Expected the masks of version 1 unchanged since they were committed", named, "in b.wide. ")


def test_many_wrong_layers_and_ranks_are_counted():
    from raysparse.sparsity.vote import unfaithful

    names, zeros = [f"layer{i}" for i in range(6)], (0,) * 6
    cast = [Vote(rank, rank, zeros, zeros, zeros, (1,) * 6, zeros, zeros) for rank in range(20)]
    problem = unfaithful(cast, names)
    assert problem is not None
    assert problem.startswith("from ranks 0, 1, 2, 3, 4, 5, 6, 7 and 12 more, 0000000000000001 instead of 0000000000000000 in layer0, ")
    assert problem.endswith("in layer2 and 3 more layers")


def test_view(journal):
    manager = MaskManager(journal)
    assert manager.view() == {"attempt": 0}
    manager = begun(journal, 3)
    view = manager.view(last=2)
    assert view["layers"][1] == {"name": "a.tall", "shape": [7, 4], "nnz": AGENDA.plan(3)["a.tall"], "planned": AGENDA.plan(3)["a.tall"]}
    assert [record["version"] for record in view["last"]] == [2, 3]
    assert "nnz" not in view["last"][0]
    assert view["now"]["digest"] == manager.history()[-1]["digest"]
    assert (view["attempt"], view["world_size"], view["steps"], view["updates"]) == (1, 2, 40, len(AGENDA.update_steps))
    assert view["published"] is None
    assert json.loads(json.dumps(view)) == view


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("", "its first line has no attempt and nonce"),
        ('{"version": 0}\n', "its first line has no attempt and nonce"),
        ('{"attempt": 1, "nonce": "x"}\nnot json\n{"version": 1}\n', "line 2 is no JSON"),
        ('{"attempt": 1, "nonce": "x"}\n[1]\n', "line 2 is no object"),
        ('{"attempt": 1, "nonce": "x"}\n{"version": 0}\n{"version": 2}\n', "its versions are not 0 to 1 in order"),
    ],
)
def test_a_file_that_is_no_journal(journal, content, problem):
    journal.write_text(content)
    with pytest.raises(ConfigError, match=r"Expected the journal of a topology in .* Got a file that was changed: .* delete it") as error:
        MaskManager(journal)
    assert problem in str(error.value)
    assert journal.read_text() == content
