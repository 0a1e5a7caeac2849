"""The kernels of blocks on a GPU: `make gpu`. Without one they are interpreted and compiled ahead of time (`test_gpu`)."""

from typing import Any

import pytest
import torch
from torch import nn

from raysparse.kernels.bits import pack
from raysparse.kernels.linear import SPARSE, adopt
from raysparse.kernels.stream import Use
from raysparse.kernels.tiles import SIZES, Tiles, why_not
from tests.kernels.test_tiles import mask_of

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_the_test_at_the_start_passes(size, dtype):
    assert why_not(torch.device("cuda"), dtype, size) is None


@pytest.mark.parametrize("tokens", [1, 70, 1000])
@pytest.mark.parametrize("size", SIZES)
def test_products_are_those_of_float64(size, tokens):
    mask = mask_of(6, 4, size, 0.4, seed=2).cuda()
    generator = torch.Generator("cuda").manual_seed(0)
    shapes = mask.shape, (tokens, mask.shape[1]), (tokens, len(mask))
    weight, x, dy = (torch.randn(shape, generator=generator, device="cuda").bfloat16() for shape in shapes)
    weight *= mask
    w, a, g = weight.double(), x.double(), dy.double()
    for use, exact in {Use.FORWARD: a @ w.t(), Use.BACKWARD: g @ w, Use.GRADIENT: (g.t() @ a) * mask}.items():
        tiles = Tiles(pack(mask), mask.shape[1], torch.bfloat16, use, size)
        tiles.load(weight)
        found = tiles.gradient(x, dy) if use is Use.GRADIENT else tiles.multiply(x if use is Use.FORWARD else dy)
        torch.testing.assert_close(found.double(), exact, rtol=1e-2, atol=1e-2 * float(exact.abs().max()))
        assert use is not Use.GRADIENT or not found[~mask].any()


def test_another_mask_compiles_nothing_anew():
    linear = nn.Linear(512, 512, device="cuda", dtype=torch.bfloat16)
    layer: Any = adopt(linear)
    layer.sparsify(pack(mask_of(4, 4, 128).cuda()), torch.bfloat16, SPARSE, 128)
    compiled, x = torch.compile(layer, fullgraph=True), torch.randn(64, 512, device="cuda", dtype=torch.bfloat16)
    compiled(x).sum().backward()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in range(3):
            mask = mask_of(4, 4, 128, seed=seed).cuda()
            layer.sparsify(pack(mask), torch.bfloat16, SPARSE, 128)
            with torch.no_grad():
                layer.weight.normal_().mul_(mask)
            torch.testing.assert_close(compiled(x), nn.functional.linear(x, layer.weight, layer.bias), rtol=2e-2, atol=2e-1)
