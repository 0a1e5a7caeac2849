"""Resuming is exact, at any number of ranks and after any damage; what is kept is what was promised."""

import json
import logging
import math
import shutil
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from raysparse.config import ConfigError
from raysparse.train import checkpoint, loop
from raysparse.train.checkpoint import MARKER, committed, damage, newest
from raysparse.train.state import Training
from tests.ranks import spawn
from tests.train.steps import SPARSE, Died, assemble, differences, run, snapshot

LOOSE = {"run": {"name": "steps", "seed": 3}}
PARITY = {"run": {"name": "steps", "seed": 3, "parity": True}}
# 2 rows in the feed-forward layers: one of 3 ranks has none.
THIN = {"model": {"preset": "debug", "overrides": {"n_embd": 40, "n_head": 5, "n_layer": 2, "n_inner": 2, "vocab_size": 101}}}


RIGL = {"target": 0.75, "evolution": {"type": "rigl", "update_interval": 1}}
"""Other masks in every step."""


def every(steps: int, keep: int = 10, **more: object) -> dict:
    return {"checkpoint": {"every": steps, "keep": keep} | more}


# --- going on ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["fsdp2", "none", "fairscale"])
def test_killed_and_resumed_is_bit_equal_to_straight_on(tmp_path, kind):
    """Killed in step 17, resumed in new processes from step 12; the records of steps 13 to 16 are written again."""
    if kind == "fairscale":
        pytest.importorskip("fairscale", reason="pip install 'raysparse[fairscale]'")
    sections = LOOSE | every(12) | {"sharding": {"type": kind}}
    straight = spawn(run, 2, str(tmp_path / "straight"), sections, SPARSE)
    died = spawn(run, 2, str(tmp_path / "resumed"), sections, SPARSE, 17)
    assert [result["state"]["step"] for result in died] == [16, 16]
    resumed = spawn(run, 2, str(tmp_path / "resumed"), sections, SPARSE)
    for a, b in zip(straight, resumed, strict=True):
        assert differences(a, b) == []
        assert a["state"]["losses"] == b["state"]["losses"]
    assert "going on from step_00000012" in (tmp_path / "resumed" / "console.txt").read_text()


@pytest.fixture(scope="module")
def halfway(tmp_path_factory) -> Path:
    """The folder of a run that two ranks left in step 17, with a checkpoint at 12."""
    folder = tmp_path_factory.mktemp("halfway")
    spawn(run, 2, str(folder), PARITY | THIN | every(12), SPARSE, 17)
    return folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> dict:
    return spawn(run, 1, str(tmp_path_factory.mktemp("alone")), PARITY | THIN | every(12), SPARSE)[0]


@pytest.mark.parametrize("ranks", [1, 3])
def test_saved_on_two_ranks_goes_on_bit_equal_on_others(alone, halfway, tmp_path, ranks):
    shutil.copytree(halfway, tmp_path / "run")
    for other in spawn(run, ranks, str(tmp_path / "run"), PARITY | THIN | every(12), SPARSE):
        assert differences(alone, other) == []


def masks_after_loading(folder: str) -> tuple[str, dict]:
    """Of a run whose own masks, drawn from another seed, are others."""
    t, _ = assemble(folder, PARITY | THIN | {"run": {"name": "steps", "seed": 4, "parity": True}}, SPARSE)
    return snapshot(t)["digest"], dict(t.nnz)


def test_masks_come_from_the_checkpoint(alone, halfway):
    for digest, nnz in spawn(masks_after_loading, 3, str(halfway)):
        assert digest == alone["digest"]
        assert nnz == alone["nnz"]


# --- what lies in the folder ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, dict]:
    """A run on two ranks with checkpoints at 12, 18 and 24, and its end."""
    folder = tmp_path_factory.mktemp("finished")
    return folder, spawn(run, 2, str(folder), LOOSE | every(6, keep=3), SPARSE)[0]


def test_keep_is_honoured(finished):
    folder, _ = finished
    assert [path.name for path in committed(folder / "checkpoints")] == ["step_00000012", "step_00000018", "step_00000024"]
    assert sorted((folder / "checkpoints").iterdir()) == committed(folder / "checkpoints")


def of_tensors(metadata: Metadata) -> dict[str, TensorStorageMetadata]:
    return {key: entry for key, entry in metadata.state_dict_metadata.items() if isinstance(entry, TensorStorageMetadata)}


def test_masks_are_stored_in_one_bit_a_weight(finished):
    folder, end = finished
    metadata = dcp.FileSystemReader(folder / "checkpoints" / "step_00000024").read_metadata()
    stored = {key: entry for key, entry in of_tensors(metadata).items() if key.startswith("mask/")}
    assert [key.removeprefix("mask/") for key in stored] == list(end["nnz"])
    bits = bools = 0
    for key, entry in stored.items():
        rows, cols = end[key.replace("mask/", "model/")].shape
        assert entry.properties.dtype == torch.uint8
        assert tuple(entry.size) == (rows, -(-cols // 8))
        bits, bools = bits + rows * -(-cols // 8), bools + rows * cols
    pieces = [item.length for index, item in metadata.storage_data.items() if index.fqn in stored]
    assert len(pieces) == 2 * len(stored)
    headers = 1600 * len(pieces)  # of torch's file format
    assert sum(pieces) < bits + headers < bools


def test_replicas_write_a_weight_once(tmp_path):
    """Two copies of the model, each on two ranks, store as many bytes of tensors as one copy."""
    sizes = []
    for replicas in (1, 2):
        folder = tmp_path / str(replicas)
        spawn(run, 2 * replicas, str(folder), PARITY | every(24) | {"sharding": {"replicas": replicas}}, SPARSE)
        path = folder / "checkpoints" / "step_00000024"
        pieces = dcp.FileSystemReader(path).read_metadata().storage_data
        assert sum(file.stat().st_size for file in path.glob("*.distcp")) == sum(piece.length for piece in pieces.values())
        sizes.append({index: piece.length for index, piece in pieces.items() if index.fqn != "extra"})
    assert sizes[0] == sizes[1]


def test_marker_knows_every_file(finished):
    folder, _ = finished
    for path in committed(folder / "checkpoints"):
        files = json.loads((path / MARKER).read_text())["files"]
        assert files.keys() == {".metadata", "__0_0.distcp", "__1_0.distcp", "topology.jsonl"}
        assert files.keys() | {MARKER} == {file.name for file in path.iterdir()}
        assert damage(path) is None


def unmarked(folder: str) -> dict:
    """A process that ends when everything is written but the marker."""

    def die(file: Path) -> int:
        raise Died

    checkpoint.crc32 = die
    return run(folder, LOOSE, SPARSE)


def test_folder_without_its_marker_is_not_a_checkpoint(tmp_path):
    (died,) = spawn(unmarked, 1, str(tmp_path))
    assert died["state"]["step"] == 24
    (left,) = (tmp_path / "checkpoints").iterdir()
    assert {file.name for file in left.iterdir()} == {".metadata", "__0_0.distcp", "topology.jsonl"}
    assert newest(tmp_path / "checkpoints") is None
    (again,) = spawn(run, 1, str(tmp_path), LOOSE, SPARSE)
    (other,) = spawn(run, 1, str(tmp_path / "other"), LOOSE, SPARSE)
    assert differences(again, other) == []
    assert newest(tmp_path / "checkpoints") == tmp_path / "checkpoints" / "step_00000024"
    assert not left.exists()


# --- damage -----------------------------------------------------------------------------------------------------------


def truncate(path: Path) -> None:
    file = path / "__1_0.distcp"
    file.write_bytes(file.read_bytes()[:-100])


def flip(path: Path) -> None:
    file = path / "__0_0.distcp"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def delete(path: Path) -> None:
    (path / ".metadata").unlink()


def garble(path: Path) -> None:
    (path / MARKER).write_text('{"files": {"__0_0')


@pytest.mark.parametrize(
    ("harm", "text"),
    [
        (truncate, "__1_0.distcp has "),
        (flip, "__0_0.distcp has another checksum than when it was written"),
        (delete, ".metadata is missing"),
        (garble, f"its marker {MARKER} cannot be read"),
    ],
)
def test_damaged_newest_falls_back_to_the_one_before(finished, tmp_path, caplog, harm, text):
    folder = shutil.copytree(finished[0] / "checkpoints", tmp_path / "checkpoints")
    assert newest(folder) == folder / "step_00000024"
    assert caplog.messages == []
    harm(folder / "step_00000024")
    assert newest(folder) == folder / "step_00000018"
    (message,) = caplog.messages
    assert message.startswith(f"Checkpoint {folder / 'step_00000024'} is damaged ({text}")
    assert message.endswith("; falling back to the one before.")
    harm(folder / "step_00000018")
    assert newest(folder) == folder / "step_00000012"
    harm(folder / "step_00000012")
    with pytest.raises(ConfigError) as error:
        newest(folder)
    assert str(error.value).startswith(f"Expected an undamaged checkpoint in {folder}. Got 3 damaged: step_00000024: {text}")
    assert str(error.value).endswith("Restore one from a copy, or choose another run.name to start anew.")


def run_with_log(folder: str, sections: dict) -> tuple[dict, list[str]]:
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logging.getLogger("raysparse").addHandler(handler)
    return run(folder, sections, SPARSE), messages


def test_run_goes_on_from_before_the_damage_and_ends_bit_equal(finished, tmp_path):
    """Fewer are kept from now on: the damaged one, still the last in the folder, must not displace a sound one."""
    folder, end = finished
    shutil.copytree(folder, tmp_path / "run")
    flip(tmp_path / "run" / "checkpoints" / "step_00000024")
    results = spawn(run_with_log, 2, str(tmp_path / "run"), LOOSE | every(5, keep=1))
    assert [differences(end, other) for other, _ in results] == [[], []]
    assert [[message[:10] for message in messages] for _, messages in results] == [["Checkpoint"], []]
    assert newest(tmp_path / "run" / "checkpoints") == tmp_path / "run" / "checkpoints" / "step_00000024"


def saved_before_a_damaged_one(folder: str) -> list[str]:
    t, _ = assemble(folder, LOOSE | every(0, keep=1), SPARSE)
    t.checkpointer.save(20, {})
    t.checkpointer.wait()
    return [path.name for path in committed(Path(folder) / "checkpoints")]


def test_damaged_later_checkpoint_does_not_displace_a_sound_one(finished, tmp_path):
    shutil.copytree(finished[0] / "checkpoints", tmp_path / "checkpoints")
    flip(tmp_path / "checkpoints" / "step_00000024")
    assert spawn(saved_before_a_damaged_one, 1, str(tmp_path)) == [["step_00000020", "step_00000024"]]


def refused(folder: str, sections: dict, sparsity: dict) -> str:
    try:
        assemble(folder, sections, sparsity)
    except ConfigError as error:
        return str(error)
    raise AssertionError("loaded")


NARROW = {"model": {"preset": "debug", "overrides": {"n_embd": 20, "n_head": 5, "n_layer": 2, "vocab_size": 101}}}
SHALLOW = {"model": {"preset": "debug", "overrides": {"n_embd": 40, "n_head": 5, "n_layer": 1, "vocab_size": 101}}}


@pytest.mark.parametrize(
    ("sections", "sparsity", "texts"),
    [
        (NARROW, SPARSE, ["model/transformer.wte.weight (101, 40) instead of (101, 20)"]),
        (SHALLOW, SPARSE, ["Got 40 tensors", "exp_avg/transformer.h.1.attn.c_attn.bias (120,) instead of nothing"]),
        ({}, {"target": 0.0}, ["Got 32 tensors", "model/transformer.h.0.attn.c_attn.weight live weights instead of (120, 40)"]),
        ({}, SPARSE | {"include": ["*.weight"], "exclude": ["*wpe*"]}, ["model/transformer.wte.weight (101, 40) instead of live weights"]),
    ],
    ids=["width", "depth", "dense", "more sparse weights"],
)
def test_checkpoint_of_another_model_is_refused_before_training(finished, tmp_path, sections, sparsity, texts):
    shutil.copytree(finished[0] / "checkpoints", tmp_path / "checkpoints")
    for message in spawn(refused, 2, str(tmp_path), LOOSE | sections, sparsity):
        assert message.startswith(f"Expected {tmp_path / 'checkpoints' / 'step_00000024'} to be a checkpoint of this model. Got ")
        assert message.endswith(
            "Choose another run.name, or go back to the model, the sparsity and the raysparse that the checkpoint was made with."
        )
        assert [text for text in texts if text not in message] == []


# --- live weights alone -----------------------------------------------------------------------------------------------


def test_sparse_weights_and_their_moments_take_what_lives(finished):
    """At 75 %: a quarter of three float32 tensors, a bit a weight, and four bytes a row."""
    path = finished[0] / "checkpoints" / "step_00000024"
    stored, sparse = checkpoint.stored_shapes(path), checkpoint.extra_of(path)["shapes"]
    assert len(sparse) == 8
    sizes = {"model": 4, "exp_avg": 4, "exp_avg_sq": 4, "mask": 1, "rows": 4}
    of_sparse = [key for key in stored if key.split("/")[1] in sparse]
    taken = sum(sizes[key.split("/")[0]] * math.prod(stored[key]) for key in of_sparse)
    dense = 12 * sum(math.prod(shape) for shape in sparse.values())
    assert taken / dense < 0.27
    assert {key.split("/")[0] for key in of_sparse} == sizes.keys()


def test_a_checkpoint_is_read_whole_by_one_process(finished):
    path, expected = finished[0] / "checkpoints" / "step_00000024", finished[1]
    weights, masks = checkpoint.read_weights(path), checkpoint.read_masks(path)
    assert {f"model/{name}" for name in weights} == {key for key in expected if key.startswith("model/")}
    for name, weight in weights.items():
        assert torch.equal(weight, expected[f"model/{name}"])
    for name, bits in masks.items():
        assert torch.equal(bits, expected[f"mask/{name}"])


def resumed(folder: str, state: str) -> dict:
    return run(folder, LOOSE | every(4) | {"optimizer": {"state": state}}, SPARSE)


@pytest.mark.parametrize(("first", "second"), [("live", "dense"), ("dense", "live")])
def test_moments_of_live_weights_and_of_all_are_one_format(tmp_path, first, second):
    """A run goes on with the other kind, on another number of ranks."""
    assert spawn(run, 3, str(tmp_path), LOOSE | every(4) | {"optimizer": {"state": first}}, SPARSE, 14)[0]["state"]["step"] == 13
    found = spawn(resumed, 2, str(tmp_path), second)
    straight = spawn(run, 3, str(tmp_path / "straight"), LOOSE | every(4), SPARSE)
    assert found[0]["digest"] == straight[0]["digest"]
    for name, value in straight[0].items():
        if name.startswith(("model/", "exp_avg")):
            torch.testing.assert_close(found[0][name], value, rtol=1e-3, atol=1e-4)


DEAD = SPARSE | {"layers": {"transformer.h.0.mlp.c_fc.weight": 1.0}}


def test_a_layer_without_live_weights_goes_on(tmp_path):
    straight = spawn(run, 2, str(tmp_path / "straight"), LOOSE | every(12), DEAD)
    spawn(run, 2, str(tmp_path / "resumed"), LOOSE | every(12), DEAD, 17)
    for a, b in zip(straight, spawn(run, 2, str(tmp_path / "resumed"), LOOSE | every(12), DEAD), strict=True):
        assert a["nnz"]["transformer.h.0.mlp.c_fc.weight"] == 0
        assert differences(a, b) == []
    weights = checkpoint.read_weights(tmp_path / "resumed" / "checkpoints" / "step_00000024")
    assert not weights["transformer.h.0.mlp.c_fc.weight"].any()


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_checkpoints_of_whole_weights_are_still_read(finished, tmp_path):
    """As they were before live elements were stored alone."""
    path, (_, end) = finished[0] / "checkpoints" / "step_00000024", finished
    old = {key: value for key, value in end.items() if key.startswith(("model/", "mask/"))}
    dcp.save(old | {"extra": json.dumps({"step": 24})}, checkpoint_id=tmp_path, no_dist=True)
    assert checkpoint.sparse_shapes(tmp_path) == checkpoint.sparse_shapes(path)
    read = checkpoint.read_weights(tmp_path)
    assert all(torch.equal(value, read[key.removeprefix("model/")]) for key, value in old.items() if key.startswith("model/"))


# --- in the background ------------------------------------------------------------------------------------------------


def late(folder: str) -> None:
    """Asynchronous saving, at its slowest: nothing is written before two more steps have been made, or training waits."""
    t, state = assemble(folder, LOOSE | every(4, asynchronous=True), SPARSE)
    write, wait, may_write = FileSystemWriter.write_data, t.checkpointer.wait, threading.Event()

    def held(*args, **kwargs):
        assert may_write.wait(60)
        return write(*args, **kwargs)

    def waited() -> None:
        may_write.set()
        wait()
        may_write.clear()

    t.checkpointer.wait = waited
    FileSystemWriter.write_data = held
    t.optimizer.register_step_post_hook(lambda *_: may_write.set() if state.step % 4 == 1 else None)
    loop.train(t, state)


def copied_late(folder: str) -> None:
    """Nothing is copied before the next step's gradients are there: an optimizer that does not wait has stepped by then."""
    t, state = assemble(folder, LOOSE | every(4, asynchronous=True), RIGL)
    copied, wait, forward_backward, may_copy = checkpoint._copied, t.checkpointer.wait, loop.forward_backward, threading.Event()

    def held(tensor):
        assert may_copy.wait(60)
        time.sleep(0.005)
        return copied(tensor)

    def done(*args):
        result = forward_backward(*args)
        may_copy.set()
        return result

    def waited() -> None:
        may_copy.set()  # no step comes after the last one
        wait()
        may_copy.clear()

    t.checkpointer.wait, checkpoint._copied, loop.forward_backward = waited, held, done
    loop.train(t, state)


def tensors(path: Path) -> dict:
    entries = of_tensors(dcp.FileSystemReader(path).read_metadata())
    state = {key: torch.empty(entry.size, dtype=entry.properties.dtype) for key, entry in entries.items()}
    dcp.load(state, checkpoint_id=path, no_dist=True)
    return state


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize(("slow", "sparsity"), [(late, SPARSE), (copied_late, RIGL)], ids=["writing", "copying"])
def test_asynchronous_saving_stores_the_step_it_was_asked_for(tmp_path, slow, sparsity):
    spawn(slow, 2, str(tmp_path / "late"))
    spawn(run, 2, str(tmp_path / "at once"), LOOSE | every(4, asynchronous=False), sparsity)
    paths = [committed(tmp_path / name / "checkpoints") for name in ("late", "at once")]
    assert [path.name for path in paths[0]] == [f"step_{step:08d}" for step in range(4, 25, 4)]
    before = None
    for a, b in zip(*paths, strict=True):
        assert differences(tensors(a), tensors(b)) == []
        assert before is None or differences(before, tensors(a)) != []
        before = tensors(a)


# --- the best one -----------------------------------------------------------------------------------------------------


def stopped_early(folder: str, die_in: int) -> dict:
    """Validation losses by the book: the best at step 4, two worse ones, and the run ends in step 12."""
    t, state = assemble(folder, {"training": {"length": 24, "sequences": 6, "validate_every": 4, "patience": 2}} | every(2, keep=1), SPARSE)
    losses, at = {4: 3.0, 8: 3.5, 12: 3.2}, {}

    def validate(t: Training) -> tuple[float, float]:
        return losses[state.step], 0.1

    def look(*_) -> None:
        at[state.step] = snapshot(t)
        if state.step + 1 == die_in:
            t.checkpointer.wait()
            raise Died

    loop.validate = validate
    t.optimizer.register_step_pre_hook(look)
    try:
        state = loop.train(t, state)
    except Died:
        return {"kept": [path.name for path in committed(Path(folder) / "checkpoints")]}
    return {"state": vars(state), "trained": list(at), "best": at.get(4), "last": at.get(11), "end": snapshot(t)}


def test_early_stopping_keeps_the_best_checkpoint_and_ends_with_it(tmp_path):
    first, second = spawn(stopped_early, 2, str(tmp_path / "straight"), 0)
    for found in (first, second):
        assert (found["state"]["step"], found["state"]["best_step"]) == (12, 4)
        assert found["state"]["losses"]["validation"] == 3.0
        assert found["trained"] == list(range(12))
        assert differences(found["best"], found["end"]) == []
        assert differences(found["last"], found["end"]) != []
    assert [path.name for path in committed(tmp_path / "straight" / "checkpoints")] == ["step_00000004", "step_00000012"]
    assert "back to the weights of step 4, which validated best" in (tmp_path / "straight" / "console.txt").read_text()
    # Killed after the best step: it is protected although only the newest is to be kept.
    assert spawn(stopped_early, 2, str(tmp_path / "resumed"), 11)[0] == {"kept": ["step_00000004", "step_00000010"]}
    resumed = spawn(stopped_early, 2, str(tmp_path / "resumed"), 0)[0]
    assert resumed["trained"] == [10, 11]
    assert differences(resumed["end"], first["end"]) == []
    # Killed between the last step and the end: no step is left to train.
    again = spawn(stopped_early, 2, str(tmp_path / "straight"), 0)[0]
    assert again["trained"] == []
    assert differences(again["end"], first["end"]) == []
