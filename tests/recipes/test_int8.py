"""A sparse model scored in int8 beside its floats, and fine-tuned to be scored so."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from raysparse.config import ConfigError, merge
from raysparse.models.build import ModelConfig, build
from raysparse.models.hub_config import ANY_KIND
from raysparse.models.int8 import KINDS, make_aware, quantize
from raysparse.recipes import evaluate, finetune, prune, text
from raysparse.recipes.evaluate import FLOAT_PREDICTIONS, PREDICTIONS, EvaluateConfig
from raysparse.recipes.export import MASKS, ExportConfig, export
from raysparse.recipes.finetune import FinetuneConfig
from raysparse.recipes.job import Job
from raysparse.train.metrics import Console
from raysparse.train.run import LocalRun
from tests.ranks import spawn
from tests.recipes.test_encoder_decoders import carry_out, prune_config, speech, translation  # noqa: F401

pytest.importorskip("torchao", reason="pip install 'raysparse[int8]'")
GPT = {"preset": "debug", "overrides": {"n_embd": 32, "n_head": 2, "n_layer": 2}}
SCORED = ("run", "task", "context", "source_context", "generation", "evaluation", "cache_dir")


@pytest.fixture
def gpt(translation) -> dict[str, Any]:  # noqa: F811
    return translation | {"model": GPT}


@pytest.fixture(params=["gpt", "translation", "speech"])
def values(request) -> dict[str, Any]:
    metrics = {"gpt": ["chrf", "perplexity"], "translation": ["chrf", "perplexity"], "speech": ["wer", "perplexity"]}[request.param]
    return merge(request.getfixturevalue(request.param), {"task": {"metrics": metrics}})


def pruned(values: dict[str, Any], tmp_path: Path) -> Path:
    """A run that ends with a 2:4 sparse model, trained a little."""
    dense = FinetuneConfig.check(merge(values, {"evaluation": {"max_examples": 1}}))
    carry_out(finetune, dense, tmp_path)
    pattern = {"target": 0.5, "pattern": {"type": "n:m", "n": 2, "m": 4}}
    config = prune_config(values, dense.run.path, method={"type": "magnitude"}, sparsity=pattern)
    carry_out(prune, config, tmp_path)
    return config.run.path


def scoring(values: dict[str, Any], model: Path, name: str, weights: str) -> EvaluateConfig:
    own = {"model": {"path": str(model)}, "run": values["run"] | {"name": name}, "weights": weights}
    return EvaluateConfig.check({key: values[key] for key in SCORED} | own)


def on_ranks(job: Job) -> dict[str, Any]:
    return evaluate.work(job, LocalRun(Console()))


def test_scores_in_int8_stand_beside_those_in_float(values, tmp_path):
    model = pruned(values, tmp_path)
    dense = scoring(values, model, "dense", "dense")
    floats = carry_out(evaluate, dense, tmp_path)["task"]
    assert "quantization" not in floats
    for kind in KINDS:
        config = scoring(values, model, kind, kind)
        job = evaluate.open_run(config)
        summary, other = spawn(on_ranks, 2, job)
        told = summary["task"]["quantization"]
        assert other["task"]["quantization"] == told
        assert told["float_scores"] == pytest.approx(floats["scores"])
        assert (config.run.path / FLOAT_PREDICTIONS).read_text() == (dense.run.path / PREDICTIONS).read_text()
        assert len((config.run.path / PREDICTIONS).read_text().splitlines()) == 6

        exact = summary["task"]["scores"]["perplexity"] / floats["scores"]["perplexity"]
        assert exact != 1.0
        assert exact == pytest.approx(1.0, abs=0.02)
        assert told["live"] == json.loads((model / "summary.json").read_text())["sparsity"]["nnz"]
        assert 0 < told["nnz"] <= told["live"] == told["weights"] / 2
        said = text(summary, job)
        assert f"in float32        {next(iter(floats['scores']))} {next(iter(floats['scores'].values())):.2f}" in said
        assert f"{told['nnz']:,} live weights of {told['weights']:,}: every zero is still one" in said


def tuned(values: dict[str, Any], model: Path, name: str, **sections: Any) -> tuple[dict[str, Any], FinetuneConfig]:
    own = {"run": {"name": name}, "model": {"path": str(model)}}
    own["sparsity"] = {"masks": "keep" if (model / "export" / MASKS).exists() else "lift"}
    shared = {key: value for key, value in values.items() if key not in ("model", "tokenizer", "kernels")}
    config = FinetuneConfig.check(merge(shared, own | {"kernels": "auto"} | sections))
    return carry_out(finetune, config, Path(values["run"]["folder"]).parent), config


def test_training_for_int8_keeps_the_masks_and_exports_floats(values, tmp_path):
    parent = pruned(values, tmp_path)
    teacher = {"teacher": str(Path(values["run"]["folder"]) / values["run"]["name"]), "eps": 1e-8}
    summary, config = tuned(values, parent, "aware", quantization="int8", distillation=teacher)
    run = config.run.path
    before, after = (load_file(folder / "export" / MASKS) for folder in (parent, run))
    assert all(torch.equal(bits, after[name]) for name, bits in before.items())
    told = summary["task"]["quantization"]
    assert (told["type"], told["live"]) == ("int8", summary["sparsity"]["nnz"])
    assert summary["sparsity"]["actual"] == 0.5
    assert (run / FLOAT_PREDICTIONS).exists()

    again = carry_out(evaluate, scoring(values, run, "again", "int8"), tmp_path)["task"]
    assert again["scores"] == pytest.approx(summary["task"]["scores"])
    assert again["quantization"] == told

    models = [build(ModelConfig(path=str(run / "export")), 0, kinds=ANY_KIND).eval() for _ in range(3)]
    make_aware(models[0], "int8")
    quantize(models[1], "int8")
    trained, scored, plain = map(logits, models)
    assert not torch.equal(plain, scored)
    if told["lowest"] == -128:  # on CPUs without VNNI torchao halves the range
        assert torch.equal(trained, scored)

    export(ExportConfig(run=str(run), to=str(tmp_path / "again")))
    files = [load_file(folder / "model.safetensors") for folder in (run / "export", tmp_path / "again")]
    assert all(value.dtype == torch.float32 and torch.equal(value, files[1][name]) for name, value in files[0].items())


def logits(model: Any) -> torch.Tensor:
    ids = torch.arange(24).view(2, 12) % model.config.vocab_size
    inputs: dict[str, Any] = {"input_ids": ids}
    if hasattr(model.config, "num_mel_bins"):
        inputs = {"input_features": torch.randn(2, 16, 100, generator=torch.Generator().manual_seed(1)), "decoder_input_ids": ids}
    elif model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids.flip(0)
    with torch.no_grad():
        return model(**inputs).logits


def spoil(export_folder: Path, factor: float) -> None:
    """The same function in floats, hard in int8: of each norm one output is divided by `factor`, what reads it is multiplied by it."""
    file = export_folder / "model.safetensors"
    state = load_file(file)
    for norm, layer in (("ln_1", "attn.c_attn"), ("ln_2", "mlp.c_fc")):
        for name in [name for name in state if name.endswith(f"{layer}.weight")]:  # [in, out] in the file
            block = name.removesuffix(f"{layer}.weight")
            state[name][3] *= factor
            state[f"{block}{norm}.weight"][3] /= factor
            state[f"{block}{norm}.bias"][3] /= factor
    save_file(state, str(file), {"format": "pt"})


def test_where_int8_hurts_training_for_it_helps(gpt, tmp_path):
    values = merge(gpt, {"task": {"metrics": ["perplexity"]}, "context": 40, "training": {"length": 300, "validate_every": 150}})
    dense = FinetuneConfig.check(values)
    carry_out(finetune, dense, tmp_path)
    spoil(dense.run.path / "export", 2000.0)
    values = merge(values, {"training": {"length": 60, "validate_every": 60}})
    start = carry_out(evaluate, scoring(values, dense.run.path, "start", "int8"), tmp_path)["task"]
    assert start["scores"]["perplexity"] > 1.5 * start["quantization"]["float_scores"]["perplexity"]
    found = {}
    for kind in ("none", "int8"):
        _, config = tuned(values, dense.run.path, f"tuned-{kind}", quantization=kind)
        found[kind] = carry_out(evaluate, scoring(values, config.run.path, f"scored-{kind}", "int8"), tmp_path)["task"]
    plain, aware = (found[kind]["scores"]["perplexity"] for kind in ("none", "int8"))
    assert aware < 0.7 * min(plain, start["scores"]["perplexity"])


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        (
            {"adapters": {"type": "mask_lora"}, "sparsity": {"masks": "keep"}},
            "adapters.type none or selective with quantization=int8",
        ),
        ({"kernels": "sparse"}, "Expected kernels auto or dense with quantization=int8"),
        ({"quantization": "int4"}, "quantization: Input should be 'none', 'int8' or 'int8_weight_only'"),
    ],
)
def test_refused_by_the_config(gpt, sections, expected):
    with pytest.raises(ConfigError) as error:
        FinetuneConfig.check(merge(gpt | {"quantization": "int8"}, sections))
    assert expected in str(error.value)


def test_refused_before_the_run(gpt, tmp_path, monkeypatch):
    config = FinetuneConfig.check(merge(gpt, {"evaluation": {"max_examples": 1}, "training": {"length": 2}}))
    carry_out(finetune, config, tmp_path)
    packed = tmp_path / "packed"
    export(ExportConfig(run=str(config.run.path), to=str(packed), format="packed", dtype="int8"))
    with pytest.raises(ConfigError, match=r"Expected weights=packed for .*packed\. Got weights=int8, and a packed model"):
        evaluate.check(scoring(gpt, packed, "x", "int8"))
    monkeypatch.setitem(__import__("sys").modules, "torchao.quantization", None)
    with pytest.raises(ConfigError, match=r"Expected the package torchao for int8\..*pip install 'raysparse\[int8\]'"):
        evaluate.check(scoring(gpt, config.run.path, "x", "int8"))
    with pytest.raises(ConfigError, match="Expected the package torchao for int8"):
        finetune.check(FinetuneConfig.check(gpt | {"quantization": "int8_weight_only"}))
    evaluate.check(scoring(gpt, config.run.path, "x", "dense"))
