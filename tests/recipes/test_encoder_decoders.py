"""From pairs of texts, and of recordings and texts, to a trained and scored T5 and Whisper, through the commands' own functions."""

import json
import math
import os
import random
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from raysparse.config import ConfigError, merge
from raysparse.models.build import ModelConfig, build
from raysparse.models.hub_config import ANY_KIND
from raysparse.recipes import MODULES, evaluate, finetune, generate, pretrain, prune, zeroshot
from raysparse.recipes.evaluate import EvaluateConfig
from raysparse.recipes.export import MASKS, ExportConfig, export
from raysparse.recipes.finetune import FinetuneConfig
from raysparse.recipes.generate import GenerateConfig
from raysparse.recipes.job import Job
from raysparse.recipes.pretrain import PretrainConfig
from raysparse.recipes.prune import PruneConfig
from raysparse.recipes.zeroshot import ZeroshotConfig
from raysparse.runtime.local import run_here
from raysparse.train.metrics import Console
from raysparse.train.run import LocalRun
from tests.ranks import spawn
from tests.sounds import tone, wav

WORDS = {"one": "eins", "two": "zwei", "three": "drei", "four": "vier", "five": "fünf"}
T5 = {"preset": "t5-small", "overrides": {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4}}
WHISPER = {
    "preset": "whisper-tiny",
    "overrides": {
        "d_model": 32,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 64,
        "decoder_ffn_dim": 64,
        "num_mel_bins": 16,
        "max_source_positions": 50,
        "max_target_positions": 64,
    },
}


def carry_out(recipe, config, tmp_path) -> dict[str, Any]:
    with (tmp_path / "console.txt").open("w") as stream:
        (summary,) = run_here([recipe.open_run(config)], config.run, Console(stream))
    return summary


def write(file: Path, rows: list[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def common(tmp_path, cache_dir, name) -> dict[str, Any]:
    return {
        "run": {"name": name, "folder": str(tmp_path / "runs"), "device": "cpu"},
        "tokenizer": {"type": "train", "vocab_size": 300},
        "context": 16,
        "source_context": 16,
        "optimizer": {"lr": 5e-3},
        "schedule": {"warmup": 5},
        "training": {"length": 30, "sequences": 8, "micro": 4, "validate_every": 15, "validation_sequences": 8},
        "checkpoint": {"every": 15},
        "logging": {"every": 5},
        "generation": {"max_new_tokens": 8, "num_beams": 2, "batch_size": 4},
        "evaluation": {"max_examples": 6},
        "kernels": "dense",
        "cache_dir": str(cache_dir),
    }


@pytest.fixture
def translation(tmp_path, cache_dir) -> dict[str, Any]:
    folder, rng = tmp_path / "text", random.Random(0)
    folder.mkdir()
    for split, count in (("train", 60), ("validation", 10), ("test", 10)):
        rows = [rng.choices(list(WORDS), k=rng.randint(1, 4)) for _ in range(count)]
        write(folder / f"{split}.jsonl", [{"en": " ".join(row), "de": " ".join(WORDS[word] for word in row)} for row in rows])
    files = {split: str(folder / f"{split}.jsonl") for split in ("train", "validation", "test")}
    task = {"type": "translation", "source": "en", "target": "de", "prefix": "say in German: ", "data": {"type": "files"} | files}
    return common(tmp_path, cache_dir, "t5") | {"model": T5, "task": task}


@pytest.fixture
def speech(tmp_path, cache_dir) -> dict[str, Any]:
    pytest.importorskip("soundfile")
    folder, rng = tmp_path / "audio", random.Random(0)
    folder.mkdir()
    for split, count in (("train", 30), ("validation", 6), ("test", 6)):
        rows = []
        for k in range(count):
            word = rng.choice(list(WORDS))
            file = f"{split}-{k}.wav"
            (folder / file).write_bytes(wav(tone(rng.uniform(0.2, 0.9), 200.0 * (1 + list(WORDS).index(word)))))
            rows.append({"audio": file, "text": word})
        write(folder / f"{split}.jsonl", rows)
    files = {split: str(folder / f"{split}.jsonl") for split in ("train", "validation", "test")}
    task = {"type": "speech", "data": {"type": "files"} | files}
    return common(tmp_path, cache_dir, "whisper") | {"model": WHISPER, "task": task}


@pytest.fixture(params=["translation", "speech"])
def values(request) -> dict[str, Any]:
    return request.getfixturevalue(request.param)


def prune_config(values: dict[str, Any], model: Path, **sections: Any) -> PruneConfig:
    """Half of every block's linear weights, by SparseGPT on a few of the task's pairs."""
    own = {
        "run": {"name": f"{values['run']['name']}-pruned"},
        "model": {"path": str(model)},
        "sparsity": {"target": 0.5},
        "calibration": {"samples": 20, "batch": 3, "validation_sequences": 6},
    }
    shared = {key: values[key] for key in ("run", "task", "context", "source_context", "cache_dir")}
    return PruneConfig.check(merge(shared, own | sections))


def test_a_dense_teacher_is_made_here_and_its_pruned_student_learns_from_it(values, tmp_path):
    teacher = FinetuneConfig.check(values)
    made = carry_out(finetune, teacher, tmp_path)
    name = values["run"]["name"]
    assert made["sparsity"]["actual"] == 0.0
    records = [json.loads(line) for line in (teacher.run.path / "metrics.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in records if "loss" in record]
    assert losses[-1] < 0.6 * losses[0]
    assert made["parent"] is None
    assert set(made["task"]["scores"]) == set(teacher.task.metrics)
    lines = [json.loads(line) for line in (teacher.run.path / "predictions.jsonl").read_text().splitlines()]
    assert len(lines) == 6

    pruning = prune_config(values, teacher.run.path)
    loss = carry_out(prune, pruning, tmp_path)["pruning"]["loss"]
    assert loss["before"] < loss["after"] < 2 * math.log(300)
    changes = {
        "run": {"name": f"{name}-student"},
        "model": {"path": str(pruning.run.path)},
        "sparsity": {"masks": "keep"},
        "distillation": {"teacher": str(teacher.run.path), "eps": 1e-8, "task": 0.0, "logit": 1.0},  # it has learned the task less well
    }
    student = FinetuneConfig.check(merge({key: value for key, value in values.items() if key not in ("model", "tokenizer")}, changes))
    learned = carry_out(finetune, student, tmp_path)
    assert learned["sparsity"]["actual"] == pytest.approx(0.5, abs=0.01)
    assert 0.5 < learned["flops"]["teacher"] / (learned["flops"]["dense"] / 3) < 1  # a forward pass, and logits of predicted tokens alone
    assert (student.run.path / "export" / MASKS).exists()
    told = [json.loads(line) for line in (student.run.path / "metrics.jsonl").read_text().splitlines()]
    features = [record["feature_loss"] for record in told if "feature_loss" in record]
    assert features[-1] < 0.9 * features[0]

    reads = {"path": str(student.run.path)}
    again = EvaluateConfig.check(
        {key: values[key] for key in ("task", "context", "source_context", "generation", "evaluation", "cache_dir")}
        | {"run": values["run"] | {"name": f"{name}-again"}, "model": reads}
    )
    scored = carry_out(evaluate, again, tmp_path)
    assert scored["task"]["scores"] == learned["task"]["scores"]
    assert (again.run.path / "predictions.jsonl").read_text() == (student.run.path / "predictions.jsonl").read_text()


def on_ranks(job: Job) -> dict[str, Any]:
    return MODULES["prune"].work(job, LocalRun(Console()))


def test_a_model_is_pruned_to_the_same_bits_at_any_number_of_ranks(values, tmp_path):
    model, digests, weights = exported(values, tmp_path), [], []
    for ranks in (1, 2):
        job = prune.open_run(prune_config(values, model, run={"name": f"ranks-{ranks}"}))
        results = spawn(on_ranks, ranks, job)
        assert len({result["sparsity"]["mask_digest"] for result in results}) == 1
        digests.append((results[0]["sparsity"]["mask_digest"], results[0]["pruning"]["loss"]))
        weights.append(load_file(job.path / "export" / "model.safetensors"))
    assert digests[0] == digests[1]
    assert all(torch.equal(weight, weights[1][name]) for name, weight in weights[0].items())


def exported(values, tmp_path) -> Path:
    short = merge(values, {"training": {"length": 4, "validate_every": 4}, "checkpoint": {"every": 2}, "evaluation": {"max_examples": 2}})
    config = FinetuneConfig.check(short)
    carry_out(finetune, config, tmp_path)
    return config.run.path


def test_what_is_exported_is_read_by_transformers_with_the_same_logits(values, tmp_path):
    from transformers import AutoModelForSeq2SeqLM, AutoModelForSpeechSeq2Seq, AutoTokenizer

    run = exported(values, tmp_path)
    export(ExportConfig(run=str(run), to=str(tmp_path / "out")))
    is_text = values["task"]["type"] == "translation"
    kind = AutoModelForSeq2SeqLM if is_text else AutoModelForSpeechSeq2Seq
    ours = build(ModelConfig(path=str(run / "export")), 0, kinds=ANY_KIND).eval()
    vocabulary = len(AutoTokenizer.from_pretrained(run / "export"))
    inputs: dict[str, torch.Tensor] = {"decoder_input_ids": torch.tensor([[0, 5, 7]])}
    inputs |= {"input_ids": torch.tensor([[3, 4, 5, 6]])} if is_text else {"input_features": torch.randn(1, 16, 100)}
    for folder in (run / "export", tmp_path / "out"):
        theirs, report = kind.from_pretrained(folder, output_loading_info=True)
        assert not report["missing_keys"]
        assert not report["unexpected_keys"]
        with torch.no_grad():
            assert torch.equal(theirs.eval()(**inputs).logits, ours(**inputs).logits)
        assert theirs.get_output_embeddings().weight is theirs.get_input_embeddings().weight
        assert theirs.config.vocab_size == vocabulary
    card = (run / "export" / "README.md").read_text()
    assert kind.__name__ in card
    if not is_text:
        from transformers import AutoFeatureExtractor

        assert AutoFeatureExtractor.from_pretrained(run / "export").n_samples == 16_000


def test_answers_are_those_of_a_search_by_hand(values, tmp_path):
    """Greedy, one example at a time, no cache, no padding of the source."""
    run = exported(values, tmp_path)
    greedy = merge(values, {"generation": {"num_beams": 1}, "run": {"name": "greedy"}, "evaluation": {"max_examples": 5}})
    config = EvaluateConfig.check(
        {key: greedy[key] for key in ("run", "task", "context", "source_context", "generation", "evaluation", "cache_dir")}
        | {"model": {"path": str(run)}}
    )
    carry_out(evaluate, config, tmp_path)
    given = [json.loads(line)["hypothesis"] for line in (config.run.path / "predictions.jsonl").read_text().splitlines()]
    model = build(ModelConfig(path=str(run / "export")), 0, kinds=ANY_KIND).eval()
    tokenizer = evaluate.load_tokenizer(run / "export")
    examples = evaluate.load_examples(evaluate.store_examples(config.task, config.cache_dir, ("test",)))["test"][:5]
    reader = finetune.Reader(model.config, tokenizer, config.task, config.context, config.source_context)
    for example, answer in zip(examples, given, strict=True):
        inputs = reader.prompts([example], 8).inputs([0])
        if (mask := inputs.get("attention_mask")) is not None:
            inputs["input_ids"], inputs["attention_mask"] = inputs["input_ids"][mask][None], mask[mask][None]
        for _ in range(8):
            with torch.no_grad():
                token = model(**inputs).logits[:, -1].argmax(-1, keepdim=True)
            inputs["decoder_input_ids"] = torch.cat([inputs["decoder_input_ids"], token], 1)
            if int(token) == tokenizer.eos_token_id:
                break
        assert tokenizer.decode(inputs["decoder_input_ids"][0, 1:], skip_special_tokens=True).strip() == answer


def test_verbs_of_causal_models_refuse_the_others(translation, pretrain_values, tmp_path):
    folder = str(exported(translation, tmp_path) / "export")
    text = r"Expected a causal language model .* Got an encoder-decoder of the T5 type"
    with pytest.raises(ConfigError, match=text):
        generate.check(GenerateConfig.check({"model": folder, "prompt": "one"}))
    with pytest.raises(ConfigError, match=text):
        pretrain.check(PretrainConfig.check(pretrain_values | {"model": {"path": folder}}))
    with pytest.raises(ConfigError, match=text):
        zeroshot.check(ZeroshotConfig.check({"model": {"path": folder}, "task": {"type": "text", "files": "x"}}))
    with pytest.raises(ConfigError, match=text):
        export(ExportConfig(run=folder, to=str(tmp_path / "packed"), format="packed"))
    keys = ("task", "context", "source_context", "evaluation", "cache_dir")
    config = {key: translation[key] for key in keys} | {"model": {"path": folder}, "weights": "packed", "run": {"device": "cpu"}}
    with pytest.raises(ConfigError, match=text):
        evaluate.check(EvaluateConfig.check(config))


def test_a_model_that_cannot_do_the_task_is_refused(translation, speech):
    with pytest.raises(ConfigError, match=r"Expected a Whisper model\. Got an encoder-decoder of the T5 type at model\.preset t5-small"):
        finetune.check(FinetuneConfig.check(speech | {"model": T5}))
    with pytest.raises(ConfigError, match=r"causal language model .* or an encoder-decoder of the T5 type\. Got a Whisper model"):
        finetune.check(FinetuneConfig.check(translation | {"model": WHISPER}))
    with pytest.raises(ConfigError, match=r"leaves nothing out at random but by dropout.*Got \{'encoder_layerdrop': 0\.1\}"):
        finetune.check(FinetuneConfig.check(merge(speech, {"model": {"overrides": {"encoder_layerdrop": 0.1}}})))
    with pytest.raises(ConfigError, match=r"answers within the model's 64 positions\. Got 64 tokens behind 1"):
        finetune.check(FinetuneConfig.check(merge(speech, {"generation": {"max_new_tokens": 64}})))


@pytest.mark.parametrize(
    ("model", "text"),
    [
        ({"tokenizer": None}, r"Got a preset, that is random weights\. Use model\.path=.*or train from scratch: add tokenizer="),
        ({"model": {"path": "runs/x"}}, r"Expected the tokenizer of model\.path, which comes with it\. Got tokenizer besides"),
        ({"sparsity": {"masks": "keep"}}, r"Expected masks\.safetensors in preset t5-small for sparsity\.masks=keep"),
    ],
)
def test_random_weights_must_be_asked_for(translation, model, text):
    with pytest.raises(ConfigError, match=text):
        finetune.check(FinetuneConfig.check(translation | model))


def test_a_row_that_cannot_be_heard_or_has_no_text_is_named_before_the_run(speech, tmp_path):
    folder = tmp_path / "audio"
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    config = FinetuneConfig.check(speech)

    def refused(row, text):
        write(folder / "train.jsonl", [*rows[:2], row, *rows[3:]])
        evaluate._examples_by_json.cache_clear()
        with pytest.raises(ConfigError, match=text):
            finetune.open_run(config)
        assert not config.run.path.exists()

    refused({"audio": rows[2]["audio"], "text": "  "}, r"Expected a target, none of them empty, at .*train\.jsonl:3")
    refused({"audio": "lost.wav", "text": "one"}, r"recording .*lost\.wav that column 'audio' names at .*train\.jsonl:3")
    (folder / "slow.wav").write_bytes(wav(tone(rate=8000), 8000))
    refused({"audio": "slow.wav", "text": "one"}, r"a sampling rate of 16000 Hz at .*train\.jsonl:3\. Got 8000 Hz")
    (folder / "long.wav").write_bytes(wav(tone(1.5)))
    refused({"audio": "long.wav", "text": "one"}, r"recordings of at most 1 s, .* Got 1\.50 s at .*train\.jsonl:3")


def test_recordings_in_a_table_as_datasets_stores_them(speech, tmp_path):
    folder = tmp_path / "audio"
    import pyarrow
    from pyarrow.parquet import write_table

    rows = [json.loads(line) for line in (folder / "test.jsonl").read_text().splitlines()]
    cells = [{"bytes": (folder / row["audio"]).read_bytes(), "path": row["audio"]} for row in rows]
    write_table(pyarrow.table({"audio": cells, "text": [row["text"] for row in rows]}), folder / "test.parquet")
    heard = []
    for file in ("test.jsonl", "test.parquet"):
        task = FinetuneConfig.check(merge(speech, {"task": {"data": {"test": str(folder / file)}}})).task
        heard.append(evaluate.load_examples(evaluate.store_examples(task, speech["cache_dir"], ("test",)))["test"])
    import datasets

    (tmp_path / "hub").mkdir()
    columns = {"audio": cells, "text": [row["text"] for row in rows]}
    datasets.Dataset.from_dict(columns).cast_column("audio", datasets.Audio()).to_parquet(str(tmp_path / "hub" / "test.parquet"))
    task = FinetuneConfig.check(speech | {"task": {"type": "speech", "data": {"type": "hub", "name": str(tmp_path / "hub")}}}).task
    heard.append(evaluate.load_examples(evaluate.store_examples(task, speech["cache_dir"], ("test",)))["test"])
    shutil.copytree(folder, tmp_path / "a, row b", ignore=shutil.ignore_patterns("*.jsonl", "*.parquet"))  # paths are relative to it
    lines = ["audio,text", *(f"{row['audio']},{row['text']}" for row in rows)]
    (tmp_path / "a, row b" / "test.csv").write_text("\n".join(lines) + "\n")
    table = str(tmp_path / "a, row b" / "test.csv")
    files = {"type": "files", "train": table, "validation": table, "test": table}
    task = FinetuneConfig.check(speech | {"task": {"type": "speech", "data": files}}).task
    heard.append(evaluate.load_examples(evaluate.store_examples(task, speech["cache_dir"], ("test",)))["test"])
    if find_spec("torchcodec") is None:  # `datasets` takes a folder of recordings for one of its own kind, and wants that package
        beside = {"type": "hub", "name": str(tmp_path / "a, row b")}
        task = FinetuneConfig.check(speech | {"task": {"type": "speech", "data": beside}}).task
        with pytest.raises(ConfigError, match=r"Expected recordings inside the tables of .*Use data\.type=files"):
            evaluate.store_examples(task, speech["cache_dir"], ("test",))
    for path, *others in zip(*heard, strict=True):
        for other in others:
            assert path.references == other.references
            assert np.array_equal(path.audio, other.audio)
    assert heard[1][2].source == f"{folder / 'test.parquet'}, row 3"


def on_a_hub(tmp_path, name: str, folder: Path) -> dict[str, str]:
    """A cache that has the folder under a hub name, and the environment of a machine that has nothing but this cache."""
    snapshot = tmp_path / "hf" / "hub" / f"models--{name.replace('/', '--')}"
    (snapshot / "refs").mkdir(parents=True)
    (snapshot / "refs" / "main").write_text("0" * 40)
    shutil.copytree(folder, snapshot / "snapshots" / ("0" * 40))
    return {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}


def test_a_model_with_a_hub_name_is_trained_pruned_and_exported_whole(speech, tmp_path):
    """Its tokenizer, and the generation config, which names the tokens that it must not say, come along."""
    run = exported(speech, tmp_path)
    said = json.loads((run / "export" / "generation_config.json").read_text())
    (run / "export" / "generation_config.json").write_text(json.dumps(said | {"suppress_tokens": [7, 9]}))
    environment = os.environ | on_a_hub(tmp_path, "owner/tiny", run / "export")
    values = {key: value for key, value in speech.items() if key != "tokenizer"} | {"model": {"path": "owner/tiny"}}
    values = merge(values, {"training": {"length": 2, "validate_every": 2}, "checkpoint": {"every": 2}, "evaluation": {"max_examples": 2}})
    shared = {key: values[key] for key in ("run", "task", "context", "source_context", "cache_dir")}
    prunes = {"sparsity": {"target": 0.5}, "calibration": {"samples": 4, "validation_sequences": 0}, "model": {"path": "owner/tiny"}}
    for verb, own in (("finetune", values), ("prune", shared | prunes)):
        (tmp_path / f"{verb}.yaml").write_text(yaml.safe_dump(merge(own, {"run": {"name": verb}})))
        words = [sys.executable, "-m", "raysparse", verb, str(tmp_path / f"{verb}.yaml"), "--local"]
        done = subprocess.run(words, env=environment, capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False)
        assert done.returncode == 0, done.stderr
        export = tmp_path / "runs" / verb / "export"
        assert json.loads((export / "generation_config.json").read_text())["suppress_tokens"] == [7, 9]
        assert (export / "tokenizer.json").is_file()
