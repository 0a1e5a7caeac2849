"""Every benchmark runs, at toy sizes, and says what it should; its numbers mean nothing here."""

import json

import pytest
import torch

from benchmarks import answers, cpu_kernels, decode, distillation, gpu, int8, manager, masks, passes, startup, step, topology, updates
from benchmarks.measure import Ratio, interleave
from raysparse.config import load
from raysparse.data.tokenizer import TrainTokenizer, train
from raysparse.data.tokenizer import load as load_tokenizer
from raysparse.kernels import library
from raysparse.recipes.pretrain import PretrainConfig
from raysparse.sparsity.manager import MaskManager
from raysparse.sparsity.topology import Rows, Topology
from raysparse.tasks import Docstrings
from raysparse.train.process import process_group
from tests.ranks import spawn

needs_native = pytest.mark.skipif(not library.available(), reason="needs the native library")


def test_ratio_is_over_pairs_with_an_interval_of_order_statistics():
    ratio = Ratio.of([2.0 * k for k in range(1, 12)], [1.0] * 11)
    # 2 4 6 ... 22: of 11 values the 2nd smallest and 2nd largest hold the median with 98.8 %, the 3rd with 93.5 %
    assert (ratio.median, ratio.low, ratio.high) == (12.0, 4.0, 20.0)
    assert (ratio.smallest, ratio.largest) == (2.0, 22.0)
    assert str(Ratio.of([3.0, 8.0, 2.0], [2.0, 4.0, 2.0])) == "1.500 [1.000, 2.000]"


def test_interleave_gives_everyone_a_turn_in_each_round_and_drops_the_warmup():
    seen = []
    times = interleave({"a": lambda i: seen.append(f"a{i}"), "b": lambda i: seen.append(f"b{i}")}, rounds=2, warmup=1)
    assert seen == ["a0", "b0", "b1", "a1", "a2", "b2"]
    assert {name: len(values) for name, values in times.items()} == {"a": 2, "b": 2}


def test_step_compares_contestants_that_compute_the_same(tmp_path, capsys):
    threads = torch.get_num_threads()
    size = ["--layers", "1", "--width", "64", "--tokens", "8", "--vocabulary", "50", "--rounds", "3"]
    try:
        status = step.main([*size, "--out", str(tmp_path)])
    finally:
        torch.set_num_threads(threads)
    (result,) = tmp_path.glob("step_*.json")
    facts = json.loads(result.read_text())
    (one,) = facts["sizes"]
    assert one["largest_weight_difference"]["no sparsity code"] == 0
    assert one["largest_weight_difference"]["dense, FSDP2"] == 0
    assert one["largest_weight_difference"]["bare PyTorch"] < 1e-4  # the learning rate: a gradient near 0 may change its sign
    assert {len(times) for times in one["cpu_seconds"].values()} == {3}
    missed = [row["what"] for row in one["ratios"] if row["at_most"] and row["ratio"]["median"] > row["at_most"]]
    assert status == bool(missed)
    text = result.with_suffix(".md").read_text()
    assert text.count("MISSED") == len(missed)
    assert all(f"| {row['what']} |" in text for row in one["ratios"])
    assert capsys.readouterr().out.rstrip().endswith(str(result.with_suffix(".md")))
    assert {"commit", "command", "versions", "processor", "cores"} <= facts["environment"].keys()


def test_masks_take_one_bit_and_are_sharded_like_their_weights(tmp_path):
    one = spawn(masks.measure, 2, tmp_path, step.Size(layers=1, width=64, vocabulary=50, tokens=8))[0]
    assert one["bits_per_weight"] == 1.0
    assert one["share_of_sparse"] < 0.3
    assert one["share_of_sparse"] < one["share_of_file"] < 1.0
    assert one["memory_bytes_by_rank"] == one["weights_by_rank"] == [one["sparse_weights"] // 2] * 2
    assert one["sharded_like_the_weights"]
    assert f"| 2 | {one['sparse_weights']:,} | 1.0000 |" in masks.report([one])


@pytest.mark.slow
def test_masks_as_a_command(tmp_path):
    assert masks.main(["--ranks", "2", "--layers", "1", "--width", "64", "--out", str(tmp_path)]) == 0
    (one,) = json.loads(next(tmp_path.glob("masks_*.json")).read_text())["results"]
    assert one["ranks"] == 2


def test_distillation_times_every_loss_of_one_student(tmp_path):
    size = step.Size(layers=1, width=64, vocabulary=50, tokens=8)
    one = spawn(distillation.times, 1, tmp_path, size, 0.5, 0.75, 2)[0]
    assert {name: len(seconds) for name, seconds in one["cpu_s"].items()} == dict.fromkeys(distillation.LOSSES, 2)
    assert {name: len(seconds) for name, seconds in one["wall_s"].items()} == dict.fromkeys(distillation.LOSSES, 2)
    one |= {"student": "75 %", "ranks": 1, "peak_bytes": dict.fromkeys(distillation.LOSSES, 5_000_000) | {"KL": 7_000_000}}
    text = distillation.report([one])
    assert "| 75 %, 1 rank: no teacher |" in text
    assert "| +2 | 1.40 |" in text


@pytest.mark.slow
def test_distillation_as_a_command(tmp_path):
    size = ["--layers", "1", "--width", "64", "--vocabulary", "50", "--tokens", "8"]
    distillation.main(["--ranks", "2", *size, "--rounds", "2", "--out", str(tmp_path)])
    (result,) = tmp_path.glob("distillation_*.json")
    results = json.loads(result.read_text())["results"]
    assert [(one["ranks"], one["student"]) for one in results] == [(2, "dense"), (2, "75 %")]
    assert all(bytes_ > 0 for one in results for bytes_ in one["peak_bytes"].values())


def tiny_layer() -> updates.Layer:
    """40 x 40, every fourth weight live: 400, of which an update drops 120."""
    shape = (40, 40)
    mask = (torch.arange(1600) % 4 == 0).view(shape)
    return updates.Layer(Topology({"weight": shape}, {"weight": Rows(0, *shape)}, {"weight": mask}))


def test_plain_selections_agree_and_differ_from_ours_only_in_what_may_come_back():
    layer = tiny_layer()
    layer.check()
    assert layer.drop == 120
    plain, ours = layer.by_argpartition().view_as(layer.mask), layer.ours("rigl")
    assert torch.equal(plain, layer.by_topk().view_as(layer.mask))
    came_back = ours.dropped["weight"] & ours.grown["weight"]
    assert came_back.any()
    assert int((ours.masks["weight"] & ~plain).sum()) == int(came_back.sum())


def test_a_selection_that_is_not_the_best_is_noticed(monkeypatch):
    layer = tiny_layer()
    best = layer.ours("rigl").masks["weight"].flatten()
    other = best.clone()
    other[int(best.nonzero()[0])], other[int((~best).nonzero()[0])] = False, True  # as many, but not the same
    proposal = layer.ours("rigl")
    proposal.masks["weight"] = other.view_as(layer.mask)
    monkeypatch.setattr(layer, "ours", lambda rule: proposal)
    with pytest.raises(AssertionError, match="other weights than those of the definition"):
        layer.check()


def test_an_update_is_timed_beside_plain_selections_and_beside_training_steps(tmp_path):
    size = step.Size(layers=1, width=64, vocabulary=50, tokens=8)
    with process_group("cpu"):
        layer = updates.one_layer(tmp_path, (16, 24), rounds=3)
        share = updates.share(tmp_path, size, rounds=3)
    assert layer["dropped"] == 28  # 30 % of a quarter of 384
    assert {name: len(times) for name, times in layer["cpu_seconds"].items()} == dict.fromkeys(
        ["numpy argpartition", "torch topk", "RigL", "mixed", "RigL, Keeper.evolve"], 3
    )
    assert [row["at_most"] for row in layer["ratios"]] == [2.0, None, None, None]
    assert share["sparse_weights"] == 12 * 64 * 64
    (row,) = share["ratios"]
    assert row["ratio"] == Ratio.of(share["cpu_seconds"]["update"], share["cpu_seconds"]["step"])
    none: dict = {"ratios": []}
    calls = [{"seconds": [0.1, 0.3, 0.2], "at_most": 0.15}]
    facts = {"layer": layer, "steps": [share], "selections": none, "optimizers": none, "manager": {"calls": calls}}
    missed = [topology.missed(row) for row in topology.bounded(facts)]
    assert missed == [layer["ratios"][0]["ratio"].median > 2, False, False, False, row["ratio"].median > 1.5, True]
    assert topology.report_layer(layer).count("MISSED") == missed[0]
    assert topology.report_steps([share]).count("MISSED") == missed[4]


@needs_native
def test_passes_over_all_weights_are_timed_beside_torchs():
    chosen, stepped = passes.selections(1, 64, rounds=3), passes.optimizers(1, 64, rounds=3)
    assert chosen["weights"] == stepped["weights"] == 12 * 64 * 64
    assert [(row["contestant"], row["over"], row["at_most"]) for row in [*chosen["ratios"], *stepped["ratios"]]] == [
        ("magnitudes", "topk, 25 %", 0.2),
        ("random", "topk, 25 %", 0.2),
        ("SET", "topk, kept and grown", None),
        ("RigL", "topk, kept and grown", None),
        ("native", "torch, fused", None),
        ("native, masked", "torch, fused", 1.1),
        ("native, live weights alone", "torch, fused", 1.0),
    ]
    times = chosen["cpu_seconds"] | stepped["cpu_seconds"]
    for row in [*chosen["ratios"], *stepped["ratios"]]:
        assert row["ratio"] == Ratio.of(times[row["contestant"]], times[row["over"]])
    missed = [row for row in [*chosen["ratios"], *stepped["ratios"]] if topology.missed(row)]
    assert topology.report_passes(chosen, stepped).count("MISSED") == len(missed)


def test_magnitudes_that_are_not_the_largest_are_noticed():
    values = {"weight": torch.tensor([[1.0, -4.0, 2.0, 3.0]])}
    passes._check({"weight": values["weight"] == -4}, values)
    for other in ([[0, 0, 0, 1]], [[0, 1, 0, 1]]):
        with pytest.raises(AssertionError, match="weight"):
            passes._check({"weight": torch.tensor(other, dtype=torch.bool)}, values)


def test_updates_on_ranks_count_every_collective(tmp_path):
    sizes = {"one": step.Size(layers=1, width=64, vocabulary=50, tokens=8)}
    alone, both = (spawn(updates.together, n, tmp_path / str(n), sizes, 2)[0][0] for n in (1, 2))
    assert (alone["most_weights_on_a_rank"], both["most_weights_on_a_rank"]) == (49_152, 24_576)
    assert {len(row[key]) for row in (alone, both) for key in ("cpu_seconds", "wall_seconds")} == {2}
    assert alone["sent_bytes"]["selection"] == []
    # 8 bytes for each of 4 layers: is the gradient finite; then twice a histogram of 11, 10 and 10 bits, and the ties
    assert both["sent_bytes"]["selection"] == [32 * size for size in (1, *2 * (2048, 1024, 1024, 1))]
    assert len(both["sent_bytes"]["control"]) == 6  # decision, votes and verdict, each after its length


def test_the_estimate_is_the_formula_that_it_says():
    sent = {"selection": [1000, 500], "control": [100]}
    small = {"model": "a", "ranks": 1, "layers": 4, "sparse_weights": 10, "most_weights_on_a_rank": 10, "cpu_seconds": [32.0]}
    large = {"model": "b", "ranks": 1, "layers": 48, "sparse_weights": 1000, "most_weights_on_a_rank": 1000, "cpu_seconds": [2144.0]}
    rows = [small, large, large | {"ranks": 2, "most_weights_on_a_rank": 500, "cpu_seconds": [9e9], "sent_bytes": sent}]
    calls = [{"ranks": 4, "seconds": [9e9]}, {"ranks": 64, "seconds": [1.0, 5.0, 2.0]}, {"ranks": 64, "seconds": [1.0]}]
    found = topology.estimate(rows, {"layers": 48, "calls": calls})
    assert (found["a"], found["b"], found["collectives"]) == pytest.approx((2, 3, 3))  # seconds a weight, seconds a layer
    assert [check["seconds"] for check in found["checks"]] == pytest.approx([32, 2144, 1144])
    assert list(found["seconds"].values()) == pytest.approx(
        [2 * 1.3e9 / 64, 3 * 96, 2 * 3 * 63 * 100e-6, 2 * 1500 * 2 / 1e9, 64 * 100 * 2 / 1e9, 3.0 * 2]
    )
    assert found["total"] == pytest.approx(sum(found["seconds"].values()))
    assert f"| all | {found['total']:.3f} |" in topology.report_estimate(found)


def test_the_manager_commits_what_made_up_ranks_vote(tmp_path):
    agenda = updates.evolving("rigl", {"weight": (8, 10), "other": (6, 4)})
    seconds = manager.through(MaskManager(tmp_path / "journal"), agenda, 3, calls=4)
    assert {call: len(values) for call, values in seconds.items()} == {"decide": 4, "commit": 4}
    history = MaskManager(tmp_path / "journal").history()
    assert [record["version"] for record in history] == [0, 1, 2, 3, 4]
    assert len({record["digest"] for record in history}) == 5
    assert history[4]["nnz"] == agenda.plan(4)


@pytest.mark.ray
def test_the_manager_is_timed_in_an_actor(ray_instance, tmp_path):
    agenda = updates.evolving("rigl", {"weight": (8, 10)})
    seconds = manager.in_actor(tmp_path / "actor", load(PretrainConfig, [manager.MST]), agenda, 4, calls=2)
    assert {call: len(values) for call, values in seconds.items()} == {"decide": 2, "commit": 2}
    assert ray_instance.is_initialized()


@needs_native
@pytest.mark.slow
def test_topology_as_a_command(tmp_path, capsys):
    threads = torch.get_num_threads()
    try:
        status = topology.main(["--quick", "--out", str(tmp_path)])
    finally:
        torch.set_num_threads(threads)
    (result,) = tmp_path.glob("topology-quick_*.json")
    facts = json.loads(result.read_text())
    assert [(row["model"], row["ranks"]) for row in facts["ranks"]] == [("one", 1), ("two", 1), ("one", 2), ("two", 2)]
    assert {(row["where"], row["ranks"]) for row in facts["manager"]["calls"]} == {("in process", 4), ("Ray actor", 4), ("in process", 64)}
    text = result.with_suffix(".md").read_text()
    assert status == ("MISSED" in text)
    assert capsys.readouterr().out.rstrip().endswith(str(result.with_suffix(".md")))


def test_startup_finds_the_first_step(tmp_path):
    run = startup.start(tmp_path, "one", local=True)
    assert 0 < run["first_step_s"] < run["end_s"]
    assert "| local: first step | " in startup.report({"local": [run]})


@pytest.mark.slow
def test_startup_shows_the_output_of_a_command_that_fails(tmp_path):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "notes.txt").write_text("mine")
    with pytest.raises(RuntimeError, match="exit status 2") as failure:
        startup.start(tmp_path, "taken", local=True)
    assert "Got other files there" in str(failure.value)


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_layers_are_timed_in_every_manner(dtype):
    ratios = cpu_kernels.linear_ratios((24, 16, 8), dtype, {"half": cpu_kernels.mask_of((24, 16), 0.5)}, rounds=2)
    assert list(ratios) == [f"half, {part}" for part in ("forward", "dX", "dW", "products", "held", "step")]
    assert all(ratio.median > 0 for ratio in ratios.values())


@needs_native
def test_decoding_as_a_command(tmp_path, capsys):
    threads = torch.get_num_threads()
    try:
        status = decode.main(["--quick", "--threads", "1", "--rounds", "2", "--dtypes", "float32", "int8", "--out", str(tmp_path)])
    finally:
        torch.set_num_threads(threads)
    (result,) = tmp_path.glob("decode-quick_*.json")
    rows = {row["what"]: row for row in json.loads(result.read_text())["rows"]}
    assert rows["1 token, int8, 75 %, bits"]["bytes"] < rows["1 token, int8, dense"]["bytes"]
    assert status == 0, "goals are for two threads"
    assert capsys.readouterr().out.rstrip().endswith(str(result.with_suffix(".md")))


def test_answers_are_the_same_and_windows_pad_less(tmp_path):
    task = Docstrings(max_examples=24)
    tokenizer = load_tokenizer(train(TrainTokenizer(vocab_size=300), iter([e.source for e in task.examples("train")]), "x", tmp_path))
    rows = answers.answers(tokenizer, task, num_prompts=4, rounds=1)
    assert [(row["settings"], row["same"]) for row in rows] == [("greedy", 4), ("4 beams", 4)]
    found = answers.padding(tokenizer, task, steps=64)
    assert found[64] < found[1]


def test_int8_times_every_contestant(tmp_path, capsys):
    pytest.importorskip("torchao", reason="pip install 'raysparse[int8]'")
    threads = torch.get_num_threads()
    try:
        assert int8.main(["--quick", "--tokens", "1", "40", "--rounds", "3", "--threads", "1", "--out", str(tmp_path)]) == 0
    finally:
        torch.set_num_threads(threads)
    (result,) = tmp_path.glob("int8-quick_*.json")
    facts = json.loads(result.read_text())
    assert {"torch, float32", "torchao, int8", "torchao, int8_weight_only"} <= facts["40 tokens"].keys()
    assert {len(times) for times in facts["training"].values()} == {3}
    assert "quantization=int8_weight_only" in capsys.readouterr().out


def test_the_gpu_benchmark_runs_in_toy_sizes(tmp_path, capsys):
    assert gpu.main(["--quick", "--out", str(tmp_path)]) == 0
    (result,) = tmp_path.glob("gpu_*.json")
    sections = {facts["section"]: facts for facts in json.loads(result.read_text())["sections"]}
    assert not any("failed" in facts for facts in sections.values())
    assert {"toy", "step 256", "attention", "optimizer", "selection", "at size"} <= sections.keys()
    assert {"dense", "unstructured, 75 %", "block 64, 75 %", "block 128, 75 %"} <= sections["step 256"]["seconds"].keys()
    assert sections["at size"]["peak_memory_bytes"].keys() == {"measured", "plan"}
    assert "| block 128, 90 % |" in capsys.readouterr().out


def test_a_section_that_fails_is_told_and_the_others_run(monkeypatch, tmp_path):
    monkeypatch.setitem(gpu.SECTIONS, "ceilings", lambda b: 1 / 0)
    assert gpu.main(["--quick", "--only", "ceilings", "selection", "--out", str(tmp_path)]) == 1
    (result,) = tmp_path.glob("gpu_*.md")
    assert "Failed: ZeroDivisionError" in result.read_text()
    assert "| radix |" in result.read_text()
