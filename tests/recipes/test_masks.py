"""Masks on disk, whoever wrote them: read whole, counted, compared, and shown."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from raysparse.config import ConfigError
from raysparse.kernels.bits import pack, unpack
from raysparse.recipes import masks
from raysparse.recipes.export import MASKS
from raysparse.recipes.masks import count, diff, find, nnz_of_bits, read_masks, recorded, show_count, show_diff, show_view
from raysparse.sparsity.manager import MaskManager
from raysparse.sparsity.ranks import ALONE
from raysparse.sparsity.topology import Rows, Topology
from raysparse.train.state import HISTORY
from tests.ranks import spawn
from tests.train.steps import run

WIDTH_36 = {  # no weight has columns in whole bytes
    "model": {"preset": "debug", "overrides": {"n_embd": 36, "n_head": 4, "n_layer": 1, "vocab_size": 101}},
    "checkpoint": {"every": 8, "keep": 9},
}
SET = {"target": 0.75, "evolution": {"type": "set", "update_interval": 4}}


@pytest.fixture(scope="module")
def evolved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder of a run on 2 ranks, with checkpoints of steps 8, 16 and 24, and what its masks were at the end."""
    folder = tmp_path_factory.mktemp("runs") / "evolved"
    return folder, spawn(run, 2, str(folder), WIDTH_36, SET)[0]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "dense"
    spawn(run, 1, str(folder), WIDTH_36, {})
    return folder


def drawn(*rows: str) -> Tensor:
    """Bit-packed; # lives."""
    return pack(torch.tensor([[sign == "#" for sign in row] for row in rows]))


def saved(file: Path, tensors: dict[str, Tensor]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, str(file))
    return file


@pytest.fixture
def export(tmp_path: Path) -> Path:
    """An exported model of two layers, the second stored turned; layers not in alphabetical order."""
    folder = tmp_path / "export"
    saved(folder / MASKS, {"z": drawn("##.", "..#"), "a": drawn("#........#", "..........", "####......")})
    tensors = {"embedding": {"shape": [7]}, "z": {"shape": [2, 3]}, "a": {"shape": [10, 3]}}
    (folder / "sparsity.json").write_text(json.dumps({"tensors": tensors}))
    return folder


def test_counting_bits():
    assert nnz_of_bits({"a": drawn("#........#", "..........", "####......"), "b": drawn("."), "c": drawn("#" * 17)}) == {
        "a": 6,
        "b": 0,
        "c": 17,
    }


@pytest.mark.parametrize("where", ["", "checkpoints/step_00000024"])
def test_masks_of_a_checkpoint_are_whole(evolved, where):
    """Written by 2 ranks, read by one process without a group."""
    folder, end = evolved
    found = read_masks(str(folder / where), folder)
    expected = {key.removeprefix("mask/"): value for key, value in end.items() if key.startswith("mask/")}
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert nnz_of_bits(found) == end["nnz"]


def test_reading_in_a_group_needs_nobody_else(evolved):
    """Rank 0 alone may read."""
    folder, end = evolved
    assert spawn(_read_on_rank_0, 2, str(folder)) == [end["nnz"], None]


def _read_on_rank_0(folder: str) -> dict[str, int] | None:
    import torch.distributed as dist

    return nnz_of_bits(read_masks(folder, Path(folder))) if dist.get_rank() == 0 else None


def test_count_of_a_checkpoint(evolved):
    folder, end = evolved
    facts = count(folder / "checkpoints" / "step_00000024")
    assert facts["digest"] == end["digest"] == MaskManager(folder / HISTORY).history()[-1]["digest"]
    assert {layer["name"]: layer["nnz"] for layer in facts["layers"]} == end["nnz"]
    assert {layer["name"]: tuple(layer["shape"]) for layer in facts["layers"]} == {
        name: tuple(end[f"model/{name}"].shape) for name in end["nnz"]
    }
    assert facts["sparsity"] == pytest.approx(0.75, abs=1e-3)
    earlier = count(folder / "checkpoints" / "step_00000008")
    assert earlier["digest"] == MaskManager(folder / HISTORY).history()[1]["digest"] != facts["digest"]  # updates in steps 4, 8, ...


def test_count_of_an_export_knows_shapes_and_order(export):
    facts = count(export)
    shapes = {"z": (2, 3), "a": (3, 10)}
    whole = {name: unpack(bits, shapes[name][1]) for name, bits in read_masks(str(export), export).items()}
    topology = Topology(shapes, {n: Rows(0, *shape) for n, shape in shapes.items()}, {name: whole[name] for name in shapes})
    assert facts["digest"] == topology.digest(ALONE)
    assert facts["layers"] == [{"name": "z", "shape": [2, 3], "nnz": 3}, {"name": "a", "shape": [3, 10], "nnz": 6}]
    assert (facts["nnz"], facts["total"], facts["sparsity"]) == (9, 36, 0.75)
    text = show_count(facts)
    for part in (facts["digest"], "9 of 36 sparse weights (sparsity 0.750000)", "3 x 10", "0.800000"):
        assert part in text


def test_a_masks_file_alone_knows_neither(export, tmp_path):
    alone = shutil.copy(export / MASKS, tmp_path / "alone.safetensors")
    facts = count(Path(alone))
    assert facts["digest"] is None
    assert {layer["name"]: layer["shape"] for layer in facts["layers"]} == {"z": [2, 8], "a": [3, 16]}
    assert facts["nnz"] == 9
    assert "unknown without the sparsity.json" in show_count(facts)


def test_a_run_is_found_by_its_name(evolved, tmp_path, monkeypatch):
    folder, end = evolved
    monkeypatch.chdir(tmp_path)
    assert nnz_of_bits(read_masks("evolved", folder.parent)) == end["nnz"]
    assert find("evolved", folder.parent) == folder
    (tmp_path / "evolved").mkdir()
    assert find("evolved", folder.parent) == folder  # a bare name is a run's, if there is one
    assert find("./evolved", folder.parent) == tmp_path / "evolved"


def test_a_run_without_checkpoints_stands_for_its_export(export, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    shutil.move(export, folder / "export")
    assert read_masks("run", tmp_path).keys() == {"z", "a"}


def test_diff(tmp_path):
    a = saved(tmp_path / "a.safetensors", {"one": drawn("##..", "...."), "two": drawn("#.......#"), "none": drawn("...")})
    b = saved(tmp_path / "b.safetensors", {"one": drawn(".##.", "#..."), "two": drawn("#.......#"), "none": drawn("...")})
    facts = diff(a, b)
    assert facts["layers"] == [
        {"name": "none", "only_a": 0, "only_b": 0, "both": 0, "jaccard": 1.0},
        {"name": "one", "only_a": 1, "only_b": 2, "both": 1, "jaccard": 0.25},
        {"name": "two", "only_a": 0, "only_b": 0, "both": 2, "jaccard": 1.0},
    ]
    assert {key: facts[key] for key in ("only_a", "only_b", "both", "jaccard")} == {"only_a": 1, "only_b": 2, "both": 3, "jaccard": 0.5}
    text = show_diff(facts)
    assert str(a) in text
    assert text.splitlines()[-1].split() == ["all", "1", "2", "3", "0.5000"]


def test_diff_of_two_checkpoints_is_the_churn(evolved):
    """From step 16 to 24 lie the updates of steps 16 and 20, each of which moved something."""
    folder, end = evolved
    checkpoints = folder / "checkpoints"
    same, moved = diff(folder, checkpoints / "step_00000024"), diff(checkpoints / "step_00000016", folder)
    assert (same["only_a"], same["only_b"], same["jaccard"]) == (0, 0, 1.0)
    assert moved["only_a"] == moved["only_b"] > 0
    assert moved["both"] + moved["only_b"] == sum(end["nnz"].values())


def test_what_is_recorded_is_shown(evolved):
    folder, end = evolved
    assert masks.has_history(folder)
    assert not masks.has_history(folder / "checkpoints" / "step_00000024")  # its history is of no manager
    view = recorded(folder)
    assert view == MaskManager(folder / HISTORY).view()
    text = show_view({"source": "disk", "why": "no manager is running on Ray"} | view)
    last = view["now"]["version"]
    for part in (
        "from disk: no manager is running on Ray",
        f"{last} of {last}, made in step 20 of 24, phase training",
        "attempt     1, on 2 workers",
        f"{view['now']['churn']:.4f} of the live weights came to life",
        f"version {last} in {folder / 'checkpoints' / 'step_00000024'}",
        view["now"]["digest"],
    ):
        assert part in text
    name = "transformer.h.0.mlp.c_fc.weight"
    (line,) = [line.split() for line in text.splitlines() if line.startswith(name)]
    nnz = f"{end['nnz'][name]:,}"
    assert line[1:] == ["144", "x", "36", nnz, nnz, "0.750000"]
    assert [line.split()[0] for line in text.splitlines()[-last - 1 :]] == [str(version) for version in range(last + 1)]
    now = view["now"] | {"skipped": "the gradient of a is not finite"}
    live = show_view({"source": "live", "seconds": 0.84} | view | {"last": [now], "published": None})
    assert "live, 0.8 s" in live
    assert "none yet" in live
    assert live.endswith("unchanged: the gradient of a is not finite")


def refused(path: Path | str, match: str) -> None:
    with pytest.raises(ConfigError, match=r"(?s)^Expected .*Got.*\. \w") as error:
        read_masks(str(path), Path("runs"))
    assert match in str(error.value)


def test_nothing_there():
    refused("nowhere", "Got nothing there, nor in runs. Check the path.")


def test_no_masks_there(dense, tmp_path):
    refused(dense, "Got a dense model")
    refused(dense / "checkpoints" / "step_00000024", "Got a dense model")
    refused(tmp_path, "it is dense, or has no checkpoint yet")


def test_files_that_are_no_masks(tmp_path):
    (tmp_path / "text.safetensors").write_text("not safetensors at all")
    refused(tmp_path / "text.safetensors", "Expected bit-packed masks")
    refused(saved(tmp_path / "empty.safetensors", {}), "Got: an empty file")
    refused(saved(tmp_path / "model.safetensors", {"weight": torch.ones(2, 2)}), "Got: weight, which is none")
    refused(saved(tmp_path / "flat.safetensors", {"weight": torch.ones(2, dtype=torch.uint8)}), "Got: weight, which is none")


def test_a_damaged_checkpoint(evolved, tmp_path, caplog):
    folder, _ = evolved
    copy = tmp_path / "copy"
    shutil.copytree(folder / "checkpoints", copy / "checkpoints")
    damaged = copy / "checkpoints" / "step_00000024"
    (damaged / "__1_0.distcp").write_bytes(b"x" + (damaged / "__1_0.distcp").read_bytes()[1:])
    refused(damaged, "Expected an undamaged checkpoint")
    earlier = read_masks(str(copy), tmp_path)  # the newest that is whole
    expected = read_masks(str(folder / "checkpoints" / "step_00000016"), tmp_path)
    assert all(torch.equal(earlier[name], expected[name]) for name in expected)
    assert "step_00000024 is damaged" in caplog.text


def test_masks_of_different_weights(tmp_path):
    a = saved(tmp_path / "a.safetensors", {"one": drawn("##..")})
    for other in ({"two": drawn("##..")}, {"one": drawn("##..", "....")}):
        b = saved(tmp_path / "b.safetensors", other)
        with pytest.raises(ConfigError, match=r"Expected masks of the same weights in .* Got \d that differ .* Compare masks of one model"):
            diff(a, b)
