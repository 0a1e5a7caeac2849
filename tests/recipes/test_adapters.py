"""Fine-tuning with adapters from the command's config to the exported folder, and what is refused before it starts."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from raysparse.config import ConfigError, load, merge
from raysparse.kernels.bits import unpack
from raysparse.models import adapters
from raysparse.models.adapters import AllWeights, MaskLora, ScaleLora, Selective
from raysparse.models.build import ModelConfig, block_linears, build
from raysparse.recipes import finetune, pretrain
from raysparse.recipes.export import ExportConfig, export
from raysparse.recipes.finetune import FinetuneConfig
from raysparse.recipes.pretrain import PretrainConfig
from raysparse.runtime.local import run_here
from raysparse.train import checkpoint
from raysparse.train.metrics import Console

MASKED = {"type": "mask_lora", "rank": 4, "alpha": 8}


@pytest.fixture
def parent(pretrain_values, tmp_path) -> Path:
    """A finished sparse run."""
    config = PretrainConfig.check(pretrain_values)
    with (tmp_path / "parent.txt").open("w") as stream:
        run_here([pretrain.open_run(config)], config.run, Console(stream))
    return config.run.path


@pytest.fixture
def values(pretrain_values, tmp_path) -> dict[str, Any]:
    """A fine-tuning of it that keeps the masks."""
    pairs = [{"source": f"mask {i} layer", "target": f"live {i}"} for i in range(40)]
    for split in ("train", "validation", "test"):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    files = {split: str(tmp_path / f"{split}.jsonl") for split in ("train", "validation", "test")}
    return {
        "run": pretrain_values["run"] | {"name": "perp"},
        "model": {"path": str(Path(pretrain_values["run"]["folder"]) / "tiny")},
        "task": {"type": "seq2seq", "data": {"type": "files"} | files, "metrics": ["chrf"]},
        "context": 16,
        "sparsity": {"masks": "keep"},
        "optimizer": {"lr": 1e-2},
        "training": {"length": 12, "sequences": 4, "micro": 2, "validate_every": 6, "validation_sequences": 8},
        "checkpoint": {"every": 4, "keep": 9},
        "generation": {"max_new_tokens": 4},
        "evaluation": {"max_examples": 4},
        "cache_dir": pretrain_values["data"]["cache_dir"],
    }


def tuned(values: dict[str, Any], console: Path, **sections: Any) -> tuple[dict[str, Any], Path]:
    config = FinetuneConfig.check(merge(values, sections))
    with console.open("w") as stream:
        (summary,) = run_here([finetune.open_run(config)], config.run, Console(stream))
    return summary, config.run.path


def logits(model: Any, vocab: int) -> torch.Tensor:
    ids = torch.arange(24).view(2, 12) % vocab
    with torch.no_grad():
        return model.eval()(ids).logits


@pytest.mark.parametrize("kind", ["mask_lora", "scale_lora"])
def test_the_export_is_a_plain_model_that_computes_what_was_trained(parent, values, tmp_path, kind):
    from transformers import AutoModelForCausalLM

    summary, run = tuned(values, tmp_path / "console.txt", adapters=MASKED | {"type": kind})
    before, after = (load_file(folder / "export" / "model.safetensors") for folder in (parent, run))
    assert before.keys() == after.keys()
    masks, own = (load_file(folder / "export" / "masks.safetensors") for folder in (parent, run))
    assert {name: bits.tolist() for name, bits in masks.items()} == {name: bits.tolist() for name, bits in own.items()}
    for name, weight in before.items():
        if name in masks:
            dead = ~unpack(masks[name], weight.shape[0]).t()  # [in, out] on disk
            assert not after[name][dead].any()
            assert not torch.signbit(after[name][dead]).any()
            assert (after[name][~dead] != weight[~dead]).float().mean() > 0.9
        else:
            assert torch.equal(after[name], weight) == (name in ("transformer.wte.weight", "transformer.wpe.weight"))

    # the model in training, factors and all, as the last checkpoint has it
    config = {"mask_lora": MaskLora, "scale_lora": ScaleLora}[kind](rank=4, alpha=8)
    model = build(ModelConfig(path=str(parent / "export")), 0)
    adapters.adapt(model, config, 0)
    model.load_state_dict(checkpoint.read_weights(run / "checkpoints" / "step_00000012"), strict=False)
    vocab = model.config.vocab_size
    trained, start = logits(model, vocab), logits(build(ModelConfig(path=str(parent / "export")), 0), vocab)
    exported = logits(AutoModelForCausalLM.from_pretrained(run / "export"), vocab)
    assert (trained - start).abs().max() > 0.01
    torch.testing.assert_close(exported, trained, rtol=1e-4, atol=1e-5)

    export(ExportConfig(run=str(run), to=str(tmp_path / "again"), step=12))
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert {name for name in after if not torch.equal(again[name], after[name])} == set()

    factors = {name: p.numel() for name, p in model.named_parameters() if adapters.is_factor(name)}
    assert len(factors) == 2 * len(block_linears(model))
    assert summary["model"]["trained"] == sum(p.numel() for p in model.parameters() if p.requires_grad) > sum(factors.values())
    assert summary["model"]["parameters"] == sum(p.numel() for p in model.parameters()) - sum(factors.values())
    assert summary["model"]["trained_share"] == summary["model"]["trained"] / summary["model"]["parameters"]
    assert summary["memory_bytes"]["moments"] == 8 * summary["model"]["trained"]
    assert summary["memory_bytes"]["dense_moments"] == 8 * summary["model"]["parameters"]
    assert summary["sparsity"]["actual"] == 0.75
    assert f"perp: {kind} trains {summary['model']['trained']:,} parameters" in (tmp_path / "console.txt").read_text()
    assert json.loads((run / "export" / "sparsity.json").read_text())["block_linears"]["sparsity"] == 0.75


def test_all_weights_train_unless_told_otherwise(parent, values, tmp_path):
    summary, _ = tuned(values, tmp_path / "console.txt")
    assert summary["model"]["trained"] == summary["model"]["parameters"]
    assert summary["model"]["trained_share"] == 1.0
    assert " trains " not in (tmp_path / "console.txt").read_text()


def test_selective_trains_nothing_else(parent, values, tmp_path):
    summary, run = tuned(values, tmp_path / "console.txt", adapters={"type": "selective", "train": ["norm"]})
    before, after = (load_file(folder / "export" / "model.safetensors") for folder in (parent, run))
    assert {name for name in before if not torch.equal(before[name], after[name])} == {name for name in before if ".ln_" in name}
    full, _ = tuned(values, tmp_path / "full.txt", run={"name": "full"})
    assert summary["flops"]["counted"] < full["flops"]["counted"]
    assert summary["flops"]["dense"] == full["flops"]["dense"]


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        ({"sparsity": {"masks": "lift"}}, "Expected sparsity.masks=keep with adapters.type=mask_lora"),
        ({"sharding": {"type": "fairscale"}}, "Expected sharding.type fsdp2 or none with adapters.type=mask_lora"),
        ({"kernels": "sparse"}, "Expected kernels auto or dense with adapters.type=mask_lora"),
        ({"adapters": MASKED | {"rank": 0}}, "adapters.rank"),
        ({"adapters": MASKED | {"train": ["biases"]}}, "adapters.train"),
        ({"adapters": {"type": "lora"}}, "adapters: Input tag 'lora'"),
        ({"adapters": {"type": "selective", "rank": 4}}, "adapters.rank: no such key"),
        ({"adapters": {"type": "selective", "train": []}}, "adapters.train"),
    ],
)
def test_refused_by_the_config(values, sections, expected):
    with pytest.raises(ConfigError) as error:
        FinetuneConfig.check(merge(values | {"adapters": MASKED}, sections))
    assert expected in str(error.value)


def test_a_rank_that_does_not_fit_is_refused_before_anything_is_written(parent, values):
    config = FinetuneConfig.check(values | {"adapters": MASKED | {"rank": 33}})
    with pytest.raises(ConfigError, match=r"rank of at most 32, the smaller side of transformer.h.0.attn.c_attn.weight \[96, 32\]. Got 33"):
        finetune.open_run(config)
    assert not config.run.path.exists()


def test_a_dense_model_is_refused(parent, values):
    (parent / "export" / "masks.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"Expected masks.safetensors in .* for sparsity.masks=keep. Got none: the model is dense"):
        finetune.dry_run(FinetuneConfig.check(values | {"adapters": MASKED}))


def test_overrides_reach_the_adapters():
    file = Path(__file__).parents[2] / "configs" / "finetune" / "perp_e2e.yaml"
    config = load(FinetuneConfig, [file]).adapters
    assert config == MaskLora(rank=16, alpha=32, train=("bias", "norm"))
    assert load(FinetuneConfig, [file], ["adapters.rank=8"]).adapters == MaskLora(rank=8)
    assert load(FinetuneConfig, [file], ["adapters.type=scale_lora"]).adapters == ScaleLora()
    assert load(FinetuneConfig, [file], ["adapters.type=selective"]).adapters == Selective()
    assert load(FinetuneConfig, [file], ["adapters.type=none"]).adapters == AllWeights()
