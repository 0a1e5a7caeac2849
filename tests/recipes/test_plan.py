"""What `raysparse plan` says of a run whose topology evolves, against arithmetic by hand and against the loop itself."""

import json
from pathlib import Path

import pytest

from raysparse.config import load, merge, read_yaml
from raysparse.recipes import plan, pretrain
from raysparse.recipes.pretrain import PretrainConfig
from raysparse.runtime.local import run_here
from raysparse.train.metrics import Console

CONFIGS = Path(__file__).parents[2] / "configs" / "pretrain"


@pytest.fixture(scope="module")
def mst():
    return plan.plan(load(PretrainConfig, [CONFIGS / "mst_gpt2_small.yaml"]))


def test_mst_of_gpt2_small_saves_four_times_the_flops(mst):
    """MST, arXiv:2408.11746: 4x; 0.596 D + 0.271 D_head + 0.133 A at density D, attention density A, from its set-up."""
    flops = mst["flops"]
    assert flops["convention"] == "palm"
    assert round(flops["reduction"], 2) == 4.00
    assert round(flops["reduction_head_excluded"], 2) == 3.94
    assert round(flops["reduction_with_updates"], 2) == 3.96
    assert mst["mean_density"] == pytest.approx(0.24, abs=2e-4)
    assert mst["mean_attention_density"] == pytest.approx(0.9 * 0.241 + 0.1, abs=5e-4)
    assert mst["steps"] == 600_000
    assert mst["sparsity"]["total"] == 12 * 12 * 768**2 + 50304 * 768


def test_the_density_falls_and_rises_along_the_cubic(mst):
    def at(step):
        return [density for first, density in mst["density"] if first <= step][-1]

    assert at(0) == 1.0
    assert at(101) == pytest.approx(1 - 0.8 * (1 - (1 - 1 / 599) ** 3), abs=1e-8)  # after the update in step 100
    assert at(59_901) == pytest.approx(0.2, abs=1e-8)
    assert at(540_101) == pytest.approx(1 - 0.8 * (1 - (1 / 599) ** 3), abs=1e-8)
    assert at(599_901) == 1.0
    assert [phase["updates"] for phase in mst["phases"]] == [599, 4799, 599]
    assert [phase["attention_density"] == 1.0 for phase in mst["phases"]] == [False, False, True]


def test_the_page_draws_it():
    config = load(PretrainConfig, [CONFIGS / "mst_gpt2_small.yaml"])
    text = plan.show(plan.plan(config), config)
    assert "4.00x fewer, 3.94x with the head excluded" in text
    assert "3.96x with the dense gradients of 5,997 updates counted" in text
    rows = [line.partition("|")[2] for line in text.splitlines() if line[6:7] == "|"]
    assert len(rows) == 8
    assert rows[0].strip("█▇▆▅▄▃▂▁ ") == ""
    assert rows[0][0] == rows[0][-1] == "█"  # dense at both ends
    assert rows[0].count("█") < 5
    assert rows[7] == "█" * 60
    assert "ultra_sparsification" in text


@pytest.mark.parametrize("method", ["rigl", "set", "gmp"])
def test_methods_differ_in_their_sparsity_section_alone(method):
    one, other = (read_yaml(CONFIGS / f"{name}_gpt2_small.yaml") for name in ("mst", method))
    assert one.pop("sparsity") != other.pop("sparsity")
    assert one["run"].pop("name") != other["run"].pop("name")
    assert one == other


def test_rigl_counts_its_dense_gradients():
    """3 forward costs a step sparse, and 2 f_S + f_D in the step of an update (Sparse-IFT's accounting of RigL)."""
    facts = plan.plan(load(PretrainConfig, [CONFIGS / "rigl_gpt2_small.yaml"]))
    flops = facts["flops"]
    dense_matrices = 2 * 491_520 * (12 * 12 * 768**2 + 50304 * 768)
    assert facts["updates"] == 4499
    assert flops["updates"] == pytest.approx(4499 * dense_matrices * 0.8, rel=1e-6)


def test_the_plan_counts_what_the_loop_counts(pretrain_values, tmp_path):
    """The plan of a run, and the sums of the run itself."""
    timeline = [
        {"name": "warm_up", "length": 5, "sparsity": {"type": "polynomial"}, "attention": {"type": "local", "width": 4}},
        {"name": "rest", "length": 7, "sparsity": {"type": "cosine", "start": 1, "end": 0.5}},
    ]
    sparsity = {"target": 0.8, "evolution": {"type": "rigl", "update_interval": 2, "stop": "100 %"}, "timeline": timeline}
    config = PretrainConfig.check(merge(pretrain_values, {"sparsity": sparsity}))
    facts = plan.plan(config)
    job = pretrain.open_run(config)
    with (tmp_path / "console.txt").open("w") as stream:
        (summary,) = run_here([job], config.run, Console(stream))
    for key in ("counted", "dense", "updates", "reduction", "reduction_with_updates"):
        assert summary["flops"][key] == pytest.approx(facts["flops"][key], rel=1e-12), key
    for key in ("mean_density", "mean_attention_density", "updates"):
        assert summary["topology"][key] == pytest.approx(facts[key], rel=1e-12), key
    assert summary["topology"]["updates"] == 5
    live = [json.loads(line)["nnz"] for line in (job.path / "topology.jsonl").read_text().splitlines()[1:]]
    assert [sum(nnz.values()) for nnz in live] == [
        facts["sparsity"]["total"] - round(facts["sparsity"]["total"] * 0.8 * s) for s in (0, 1 - 1 / 8, 1, 0.875, 0.625, 0.5)
    ]
