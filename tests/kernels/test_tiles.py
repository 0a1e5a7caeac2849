"""Blocks: which a mask is made of, the operator over them, and runs that train through it. Their Triton kernels: `test_gpu`."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from raysparse.config import ConfigError
from raysparse.kernels import tiles
from raysparse.kernels.bits import pack
from raysparse.kernels.linear import SPARSE as ALL_SPARSE
from raysparse.kernels.linear import adopt
from raysparse.kernels.stream import Use
from raysparse.kernels.tiles import SIZES, Tiles, block_of, why_not
from raysparse.models.build import skeleton
from raysparse.recipes.pretrain import PretrainConfig, agenda_of, check_blocks
from raysparse.train.kernels import Kernels
from tests.ranks import spawn
from tests.train.steps import differences, run


def mask_of(rows: int, cols: int, size: int, density: float = 0.5, seed: int = 0) -> Tensor:
    """[rows * size, cols * size], of blocks."""
    live = torch.rand(rows, cols, generator=torch.Generator().manual_seed(seed)) < density
    return live.repeat_interleave(size, 0).repeat_interleave(size, 1)


@pytest.mark.parametrize("size", SIZES)
def test_the_largest_block_is_found(size):
    mask = mask_of(3, 4, size, seed=1)
    assert block_of(mask) == size
    mask[0, 0] ^= True
    assert block_of(mask) is None
    assert block_of(mask[:, :-1]) is None


def test_a_test_at_the_start_tells_what_is_wrong(monkeypatch):
    for dtype in (torch.float32, torch.bfloat16):
        assert why_not(torch.device("cpu"), dtype, 32) is None
    monkeypatch.setattr(Tiles, "gradient", lambda self, x, dy: dy.t() @ x)
    assert "gradient is off by" in (why_not(torch.device("cpu"), torch.float32, 32) or "")
    monkeypatch.setattr(Tiles, "multiply", lambda self, x, bias=None: 1 / 0)
    assert why_not(torch.device("cpu"), torch.float32, 32) == "ZeroDivisionError: division by zero"


def test_opcheck():
    layer = adopt(nn.Linear(48, 32))
    layer.sparsify(pack(mask_of(2, 3, 16)), torch.float32, ALL_SPARSE, 16)
    x = torch.randn(5, 48, requires_grad=True)
    torch.library.opcheck(torch.ops.raysparse.linear, (x, layer.weight, layer.bias, layer.number))


def test_another_mask_compiles_nothing_anew():
    layers = [adopt(nn.Linear(48, 48)) for _ in range(2)]
    model = nn.Sequential(layers[0], nn.GELU(), layers[1])
    for layer in layers:
        layer.sparsify(pack(mask_of(3, 3, 16)), torch.float32, ALL_SPARSE, 16)
    compiled, x = torch.compile(model, fullgraph=True, backend="aot_eager"), torch.randn(7, 48)
    compiled(x).sum().backward()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in range(3):
            for layer in layers:
                mask = mask_of(3, 3, 16, seed=seed)
                layer.sparsify(pack(mask), torch.float32, ALL_SPARSE, 16)
                with torch.no_grad():
                    layer.weight.mul_(mask)
                layer.zero_grad()
            found = compiled(x)
            torch.testing.assert_close(found, model(x))
            found.sum().backward()
            assert all(not layer.weight.grad[~mask].any() for layer in layers)


def test_a_weight_is_not_held():
    """Under FSDP2 it is gone after the product."""
    made = Tiles(pack(mask_of(2, 2, 16)), 32, torch.float32, Use.FORWARD, 16)
    made.load(torch.zeros(32, 32))
    made.multiply(torch.zeros(1, 32))
    with pytest.raises(RuntimeError, match="Expected a weight"):
        made.multiply(torch.zeros(1, 32))


MODEL = {"preset": "debug", "overrides": {"n_embd": 64, "n_head": 2, "n_layer": 2, "vocab_size": 101}}
RIGL = {
    "target": 0.5,
    "pattern": {"type": "block", "size": 16},
    "evolution": {"type": "rigl", "update_interval": 2, "optimizer_steps": True},
}


def trained(folder: str, kernels: str) -> dict[str, Any]:
    """8 steps of a run whose layers compute in blocks, here as on a GPU."""
    made: list[Kernels] = []
    find = Kernels._find_blocks

    def found(self: Kernels, *args: Any) -> None:
        made.append(self)
        find(self, *args)

    Kernels._find_blocks = found  # type: ignore[method-assign]
    init = Kernels.__init__

    def on_a_gpu(self: Kernels, *args: Any) -> None:
        init(self, *args)
        self._in_blocks = True

    Kernels.__init__ = on_a_gpu  # type: ignore[method-assign]
    length = {"length": 8, "sequences": 6, "micro": 2, "validate_every": 8, "validation_sequences": 5}
    result = run(folder, {"kernels": kernels, "training": length, "model": MODEL}, RIGL)
    assert bool(made) == (kernels == "sparse")
    assert all(set(kernel._blocks.values()) == {16} for kernel in made)
    return result


def test_a_run_in_blocks_trains_as_a_dense_one(tmp_path):
    """On CPUs both compute the same products, so bits tell whether tables, masks and the steps that look at dead gradients fit."""
    for ranks in (1, 2):
        dense, blocks = (spawn(trained, ranks, str(tmp_path / f"{ranks}-{kernels}"), kernels)[0] for kernels in ("dense", "sparse"))
        assert differences(dense, blocks) == []


class Told:
    def __init__(self) -> None:
        self.said: list[str] = []

    def show(self, fact: dict[str, Any]) -> None:
        self.said.append(fact["text"])


def kernels_of(masks: dict[str, Tensor], mode: str, told: Told, folder: Any) -> Kernels:
    kernels = Kernels({}, mode, "cpu", torch.float32, 1, told, folder / "none")  # type: ignore[arg-type]
    kernels._blocks = dict.fromkeys(masks)
    return kernels


def test_a_size_whose_test_fails_is_dense(monkeypatch, tmp_path):
    """And one that only some ranks' rows are made of."""
    monkeypatch.setattr(tiles, "why_not", lambda device, dtype, size: "no" if size == 16 else None)
    monkeypatch.setattr("raysparse.train.kernels.gathered", on_two_ranks)
    told, masks = Told(), {"a": mask_of(3, 3, 16, seed=1), "b": mask_of(3, 3, 64, seed=1), "c": torch.rand(32, 32) < 0.5}
    kernels = kernels_of(masks, "auto", told, tmp_path)
    kernels._find_blocks(masks)
    assert kernels._blocks == {"a": None, "b": 32, "c": None}
    assert told.said == [
        "kernels: blocks of 16 are multiplied whole, their test at the start failed. rank 1: no",
        "kernels: no speed is to be expected of blocks of 32 on a GPU, of 64 and 128 there is.",
    ]
    with pytest.raises(ConfigError, match=r"Expected masks in blocks of 16, 32, 64, 128 for kernels=sparse .* 2 layers, such as a\."):
        kernels_of(masks, "sparse", Told(), tmp_path)._find_blocks(masks)


def on_two_ranks(value: Any) -> list[Any]:
    """The other rank's part of `b` is made of blocks of 32, and nothing is wrong there."""
    return [value | {"b": 32}, value] if isinstance(value, dict) else [None, value]


@pytest.mark.parametrize(
    ("pattern", "fits"), [({"type": "unstructured"}, False), ({"type": "block", "size": 8}, False), ({"type": "block", "size": 64}, True)]
)
def test_sparse_kernels_on_a_gpu_want_blocks_before_anything_starts(pattern, fits):
    values = {"model": {"preset": "debug"}, "data": {"train": {"type": "python_stdlib"}}, "kernels": "sparse", "run": {"device": "cuda"}}
    config = PretrainConfig.check(values | {"sparsity": {"target": 0.5, "pattern": pattern}})
    if fits:
        check_blocks(config)
        return
    with pytest.raises(ConfigError, match=r"Expected sparsity\.pattern\.type=block with size 16, 32, 64, 128 for kernels=sparse on a GPU"):
        agenda_of(config, skeleton(config.model, 512, config.data.context))
