"""Shares of the live weights: uniform, Erdos-Renyi and its kernel form."""

import pytest

from raysparse.config import Config, ConfigError
from raysparse.sparsity.distribution import ER, ERK, AnyDistribution, Uniform
from raysparse.sparsity.plan import SparsityConfig, SparsityPlan


class Holder(Config):
    distribution: AnyDistribution


@pytest.mark.parametrize(
    ("shape", "uniform", "er", "erk"),
    [((4, 6), 24, 10, 10), ((1, 1), 1, 2, 2), ((768, 2304), 768 * 2304, 3072, 3072), ((1, 7), 7, 8, 8)],
)
def test_shares_of_matrices(shape, uniform, er, erk):
    assert (Uniform().share(shape), ER().share(shape), ERK().share(shape)) == (uniform, er, erk)


def test_erk_counts_the_kernel():
    assert ERK().share((8, 4, 3, 3)) == 18
    assert ER().share((8, 4, 3, 3)) == 12


@pytest.mark.parametrize(("name", "kind"), [("uniform", Uniform), ("er", ER), ("erk", ERK)])
def test_named_in_a_config(name, kind):
    assert Holder.check({"distribution": {"type": name}}).distribution == kind()


def test_unknown_distribution():
    with pytest.raises(ConfigError, match=r"distribution: Input tag 'erdos' found .* expected tags: 'uniform', 'er', 'erk'"):
        Holder.check({"distribution": {"type": "erdos"}})


def gpt2_small():
    """Every linear of GPT-2 small and its tied head, as MST sparsifies them."""
    block = {"attn.c_attn": (2304, 768), "attn.c_proj": (768, 768), "mlp.c_fc": (3072, 768), "mlp.c_proj": (768, 3072)}
    return {f"h.{i}.{name}": shape for i in range(12) for name, shape in block.items()} | {"lm_head": (50257, 768)}


@pytest.mark.parametrize("kind", [ER(), ERK()], ids=["er", "erk"])
@pytest.mark.parametrize(
    ("target", "c_attn", "attn_proj", "mlp", "head"), [(0.8, 0.216, 0.324, 0.203, 0.165), (0.9, 0.108, 0.162, 0.101, 0.082)]
)
def test_er_densities_of_gpt2_small(kind, target, c_attn, attn_proj, mlp, head):
    plan = SparsityPlan.build(gpt2_small(), SparsityConfig(target=target, distribution=kind))
    density = {name: plan.nnz[name] / (rows * cols) for name, (rows, cols) in plan.shapes.items()}
    for i in range(12):
        assert density[f"h.{i}.attn.c_attn"] == pytest.approx(c_attn, abs=5e-4)
        assert density[f"h.{i}.attn.c_proj"] == pytest.approx(attn_proj, abs=5e-4)
        assert density[f"h.{i}.mlp.c_fc"] == pytest.approx(mlp, abs=5e-4)
        assert abs(plan.nnz[f"h.{i}.mlp.c_fc"] - plan.nnz[f"h.{i}.mlp.c_proj"]) <= 1  # the same size, but for a remainder
    assert density["lm_head"] == pytest.approx(head, abs=5e-4)


def test_uniform_densities_are_equal():
    plan = SparsityPlan.build(gpt2_small(), SparsityConfig(target=0.75))
    assert all(plan.nnz[name] * 4 == rows * cols for name, (rows, cols) in plan.shapes.items())
