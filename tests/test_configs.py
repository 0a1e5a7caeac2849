"""Every YAML file in configs/ is a config of its verb, and the papers' recipes have the papers' numbers."""

from pathlib import Path

import pytest

from raysparse.config import load, read_yaml
from raysparse.recipes import CONFIGS, finetune
from raysparse.recipes.compare import CompareConfig, check, finetune_configs, pretrain_configs
from raysparse.recipes.finetune import FinetuneConfig
from raysparse.recipes.plan import plan
from raysparse.recipes.pretrain import PretrainConfig

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "configs").rglob("*.yaml"))
KINDS = ("pretrain", "prune", "gradual", "recover", "finetune", "evaluate", "zeroshot", "compare")
VERBS = dict(zip(KINDS, KINDS, strict=True)) | {"configs": "pretrain"}


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_every_file_is_a_config_that_says_how_to_run_it(file):
    verb = VERBS[file.parent.name]
    config = load(CONFIGS[verb], [file])
    assert type(config).check(config.model_dump(mode="json")) == config
    comments = "".join(line for line in file.read_text().splitlines(keepends=True) if line.startswith("#"))
    assert f"raysparse {verb} configs/" in comments
    assert str(file.relative_to(ROOT)) in comments


def test_the_names_that_others_rely_on():
    names = {str(file.relative_to(ROOT / "configs")) for file in FILES}
    twins = {f"pretrain/{kind}_{size}.yaml" for kind in ("dense", "spdf") for size in ("gpt2_small", "gpt3_xl")}
    assert names >= twins | {"debug.yaml", "quickstart.yaml"}


# SPDF (arXiv:2303.10464), table 1 of the supplement and section 3.1
#          parameters   sparse weights  steps   warm-up  tokens    FLOPs     reduction at 75 %
@pytest.mark.parametrize(
    ("size", "parameters", "linears", "steps", "warmup", "tokens", "flops", "reduction"),
    [
        ("gpt2_small", 125.1e6, 12 * 12 * 768**2, 4768, 715, 2.5e9, 1.46e18, 1 / 0.601),
        ("gpt3_xl", 1.315e9, 12 * 24 * 2048**2, 24796, 358, 26e9, 94.76e18, 1 / 0.401),
    ],
)
def test_spdf_recipes(size, parameters, linears, steps, warmup, tokens, flops, reduction):
    facts = plan(load(PretrainConfig, [ROOT / "configs" / "pretrain" / f"spdf_{size}.yaml"]))
    assert facts["model"]["parameters"] == pytest.approx(parameters, rel=2e-3)
    assert (facts["sparsity"]["total"], facts["sparsity"]["nnz"]) == (linears, linears // 4)
    assert (facts["steps"], facts["warmup_steps"]) == (steps, warmup)
    assert facts["tokens"] == pytest.approx(tokens, rel=1e-3)
    assert facts["flops"]["convention"] == "spdf"
    assert facts["flops"]["counted"] == pytest.approx(flops, rel=9e-3)
    assert facts["flops"]["reduction"] == pytest.approx(reduction, rel=9e-3)


@pytest.mark.parametrize("size", ["gpt2_small", "gpt3_xl"])
def test_the_dense_twin_differs_in_sparsity_alone(size):
    dense, sparse = (read_yaml(ROOT / "configs" / "pretrain" / f"{kind}_{size}.yaml") for kind in ("dense", "spdf"))
    assert dense.pop("sparsity")["target"] == 0.0
    assert sparse.pop("sparsity")["target"] == 0.75
    assert dense["run"].pop("name") != sparse["run"].pop("name")
    assert dense == sparse


@pytest.mark.parametrize("task", ["e2e", "webnlg", "dart"])
def test_finetuning_recipes(task):
    config = load(FinetuneConfig, [ROOT / "configs" / "finetune" / f"{task}.yaml"])
    assert config.training.sequences in (8, 16, 32, 64)
    assert config.optimizer.lr in (1e-4, 5e-5, 2.5e-5)
    assert (config.training.length, config.schedule.decay, config.context) == ("5 epochs", "linear", 512)
    assert (config.generation.num_beams, config.generation.no_repeat_ngram_size, config.generation.max_new_tokens) == (10, 4, 64)
    assert config.training.patience > 0
    assert config.sparsity.masks == "lift"


# SquareHead (arXiv:2310.06927), as its authors' code has it
#   recipe               epochs  lr   sequences  warm-up  decay weights  eps   decoding
SQUAREHEAD = {
    "mpt_7b_gsm8k": ("2 epochs", 1e-4, 32, "20 steps", 0.0, 1.0, 2**-7, 1),
    "t5_small_wmt_en_de": ("3 epochs", 2e-3, 128, "300 steps", 1e-4, 1.0, 1e-9, 5),
    "whisper_small_hindi": ("6 epochs", 2e-4, 32, "50 steps", 1e-4, 0.5, 1e-8, 1),
}


@pytest.mark.parametrize("recipe", SQUAREHEAD)
def test_squarehead_recipes(recipe):
    config = load(FinetuneConfig, [ROOT / "configs" / "finetune" / f"{recipe}.yaml"])
    length, lr, sequences, warmup, decay, task, eps, beams = SQUAREHEAD[recipe]
    taught = config.distillation
    assert taught is not None
    assert (taught.task, taught.logit, taught.feature, taught.eps) == (task, 0.0, 1.0, eps)
    assert (config.training.length, config.training.sequences, config.optimizer.lr) == (length, sequences, lr)
    assert (config.schedule.decay, config.schedule.warmup, config.schedule.final) == ("linear", warmup, 0.0)
    assert (config.optimizer.betas, config.optimizer.weight_decay) == ((0.9, 0.999), decay)
    assert (config.generation.num_beams, config.sparsity.masks) == (beams, "keep")
    assert config.context == {"mpt_7b_gsm8k": 512, "t5_small_wmt_en_de": 256, "whisper_small_hindi": 225}[recipe]


@pytest.mark.parametrize(("recipe", "kind"), [("tiny_translation", "text"), ("tiny_speech", "audio")])
def test_small_teachers_are_made_of_the_real_data(recipe, kind, tmp_path):
    shared = ROOT.parent / "shared" / "data"
    if not shared.is_dir():
        pytest.skip(f"the data is not at {shared}")
    if kind == "audio":
        pytest.importorskip("soundfile")
        words = [f"task.data.path={shared / 'speech_fsdd'}"]
    else:
        files = {"train": "train", "validation": "validation", "test": "test_2016_flickr"}
        words = [f"task.data.{split}={shared / 'multi30k_en_de' / file}.jsonl.gz" for split, file in files.items()]
    words += ["task.max_examples=40", f"cache_dir={tmp_path}", f"run.folder={tmp_path}"]
    found = finetune.check(load(FinetuneConfig, [ROOT / "configs" / "finetune" / f"{recipe}.yaml"], words))
    assert (found["num_pairs"], found["num_truncated"], found["num_truncated_targets"]) == (40, 0, 0)


def test_the_recipe_of_e2e_reads_the_real_data():
    folder = ROOT.parent / "shared" / "data" / "e2e_nlg"
    if not folder.is_dir():
        pytest.skip(f"the E2E data set is not at {folder}")
    config = load(FinetuneConfig, [ROOT / "configs" / "finetune" / "e2e.yaml"], [f"task.data.path={folder}"])
    sizes = {split: sum(len(e.references) for e in config.task.examples(split)) for split in ("validation", "test")}
    assert sizes == {"validation": 4672, "test": 4693}


def test_the_quickstart_compares_twins(monkeypatch):
    monkeypatch.chdir(ROOT)
    config = load(CompareConfig, [ROOT / "configs" / "compare" / "quickstart.yaml"])
    twins, tuned = pretrain_configs(config), finetune_configs(config)
    dense, sparse = (twin.model_dump(exclude={"sparsity": {"target"}, "run": {"name"}}) for twin in twins.values())
    assert dense == sparse
    assert [twin.sparsity.target for twin in twins.values()] == [0.0, 0.75]
    assert [(stage.model.path.split("/")[-1], stage.sparsity.masks) for stage in tuned.values()] == [
        ("pretrain-dense", "lift"),
        ("pretrain-sparse", "lift"),
        ("pretrain-sparse", "keep"),
    ]


def test_the_mst_demo_compares_methods_that_differ_in_sparsity_alone(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    config = load(CompareConfig, [ROOT / "configs" / "compare" / "mst_demo.yaml"], [f"run.folder={tmp_path}"])
    methods, tuned = check(config)
    assert tuned == {}
    assert list(methods) == ["pretrain-dense", "pretrain-static", "pretrain-rigl", "pretrain-mst"]
    shared = [stage.model_dump(exclude={"sparsity": {"target", "evolution", "timeline"}, "run": {"name"}}) for stage in methods.values()]
    assert all(other == shared[0] for other in shared)
    assert [stage.sparsity.target for stage in methods.values()] == [0.0, 0.8, 0.8, 0.8]
    assert [stage.sparsity.evolution.type for stage in methods.values()] == ["static", "static", "rigl", "mixed"]
    facts = {name: plan(stage) for name, stage in methods.items()}
    assert all(layers["sparsity"]["layers"][0]["name"] == "transformer.wte.weight" for layers in facts.values())
    assert facts["pretrain-mst"]["density"][0] == facts["pretrain-dense"]["density"][0] == (0, 1.0)
    assert facts["pretrain-mst"]["density"][-1][1] == 1.0
    assert [phase["steps"] for phase in facts["pretrain-mst"]["phases"]] == [[0, 30], [30, 270], [270, 300]]
    assert [phase["attention"] for phase in facts["pretrain-mst"]["phases"]] == ["local_or_strided", "local_or_strided", "full"]


def test_one_sparsity_holds_for_all_methods_that_set_none(monkeypatch):
    monkeypatch.chdir(ROOT)
    config = load(CompareConfig, [ROOT / "configs" / "compare" / "mst_demo.yaml"], ["sparsity=0.5", "methods.rigl.sparsity.target=0.9"])
    assert [stage.sparsity.target for stage in pretrain_configs(config).values()] == [0.0, 0.5, 0.9, 0.5]


def test_every_method_is_finetuned_and_only_what_ends_sparse_keeps_its_mask(monkeypatch):
    monkeypatch.chdir(ROOT)
    words = ["finetune.files=[configs/finetune/docstrings.yaml]"]
    config = load(CompareConfig, [ROOT / "configs" / "compare" / "mst_demo.yaml"], words)
    stages = {name: stage.model.path.rpartition("/")[2] for name, stage in finetune_configs(config).items()}
    assert stages == {
        "dense-to-dense": "pretrain-dense",
        "static-to-dense": "pretrain-static",
        "static-to-sparse": "pretrain-static",
        "rigl-to-dense": "pretrain-rigl",
        "rigl-to-sparse": "pretrain-rigl",
        "mst-to-dense": "pretrain-mst",
    }
