"""What a laptop refuses before anything leaves: configs, files that would stay behind, folders no node shares, clusters too small."""

import shutil
from pathlib import Path

import pytest
import yaml

from cluster.check import KINDS, Node, check_config, check_paths, check_resources, check_storage, paths_of
from cluster.ship import collect
from cluster.submit import CONFIG, Submission, prepare
from raysparse.config import ConfigError, merge
from raysparse.recipes import CONFIGS
from raysparse.recipes.pretrain import PretrainConfig
from raysparse.train.run import RunConfig


@pytest.fixture
def folder(pretrain_values, tmp_path, monkeypatch):
    """The working directory: the corpus in data/."""
    place = tmp_path / "work"
    (place / "data").mkdir(parents=True)
    shutil.copy(pretrain_values["data"]["train"]["paths"][0], place / "data" / "docs.jsonl")
    monkeypatch.chdir(place)
    return place


@pytest.fixture
def values(pretrain_values):
    changes = {"run": {"folder": "/shared/runs"}, "data": {"train": {"paths": "data/*.jsonl"}, "cache_dir": "/shared/cache"}}
    return merge(pretrain_values, changes)


def pretrain(values, **changes):
    return PretrainConfig.check(merge(values, changes))


def test_a_sound_config_leaves_nothing_but_what_only_a_cluster_knows(values, folder):
    assert check_config(pretrain(values), collect(folder), False) == []
    submission, left = prepare("pretrain", pretrain(values), folder, "100MB")
    assert submission.run == "/shared/runs/tiny"
    assert submission.parcel.files == {"data/docs.jsonl": (folder / "data" / "docs.jsonl").stat().st_size}
    assert len(left) == 3
    assert not Path("/shared").exists()


def test_a_laptop_needs_no_gpu(values, folder):
    assert check_config(pretrain(values, run={"device": "cuda", "workers": 2}), collect(folder), False) == []


def test_the_recipe_refuses_here(values, folder):
    with pytest.raises(ConfigError, match=r"Expected run.workers to divide training.sequences. Got 3 workers, 4 sequences"):
        check_config(pretrain(values, run={"workers": 3}), collect(folder), False)
    with pytest.raises(ConfigError, match=r"Expected the pattern 'nothing"):
        check_config(pretrain(values, sparsity={"include": ["nothing.*"]}), collect(folder), False)


def test_a_run_folder_that_is_here_is_looked_into(values, folder, tmp_path):
    (tmp_path / "runs" / "tiny").mkdir(parents=True)
    (tmp_path / "runs" / "tiny" / "thesis.tex").write_text("mine")
    with pytest.raises(ConfigError, match=r"Got other files there"):
        check_config(pretrain(values, run={"folder": str(tmp_path / "runs")}), collect(folder), False)


def test_data_on_the_cluster_is_left_to_it_and_the_rest_is_checked(values, folder):
    there = pretrain(values, data={"train": {"paths": ["/shared/data/*.jsonl"]}})
    assert check_config(there, collect(folder), False) == ["data.train.paths=/shared/data/*.jsonl"]
    with pytest.raises(ConfigError, match=r"divide training.sequences"):
        check_config(merged(there, run={"workers": 3}), collect(folder), False)
    with pytest.raises(ConfigError, match=r"Expected the pattern 'nothing"):
        check_config(merged(there, sparsity={"include": ["nothing.*"]}), collect(folder), False)
    masks = merged(there, sparsity={"masks": "mst", "target": 0.0})
    assert "sparsity.masks=mst" in check_config(masks, collect(folder), False)


def test_a_model_on_the_cluster_is_left_to_it(folder):
    values = {
        "run": {"folder": "/shared/runs"},
        "model": {"path": "/shared/runs/mst"},
        "task": {"type": "docstrings"},
        "cache_dir": "/shared/cache",
    }
    config = CONFIGS["finetune"].check(values | {"training": {"length": "1 epochs", "sequences": 4}})
    submission, left = prepare("finetune", config, folder, "100MB")
    assert left[0] == "model.path=/shared/runs/mst"
    assert submission.entrypoint.endswith("finetune raysparse-job/config.yaml")
    with pytest.raises(ConfigError, match=r"divide training\.sequences"):
        check_config(merged(config, run={"workers": 3}), collect(folder), False)
    for verb, task in {"evaluate": "docstrings", "zeroshot": "text"}.items():
        files = {"files": ["/shared/text.txt"]} if verb == "zeroshot" else {}
        _, left = prepare(verb, CONFIGS[verb].check(values | {"task": {"type": task} | files}), folder, "100MB")
        assert "model.path=/shared/runs/mst" in left
        assert ("task.files=/shared/text.txt" in left) == (verb == "zeroshot")


def test_a_grid_is_checked_point_by_point(folder):
    values = {
        "run": {"folder": "/shared/runs"},
        "model": {"path": "/shared/runs/mst"},
        "task": {"type": "docstrings"},
        "cache_dir": "/shared/cache",
    }
    config = CONFIGS["finetune"].check(values | {"grid": {"optimizer.lr": [1e-3, 1e-4]}})
    submission, _ = prepare("finetune", config, folder, "100MB", whole_grid=True)
    assert submission.entrypoint == "python -m cluster.begin finetune raysparse-job/config.yaml --grid"
    with pytest.raises(ConfigError, match=r"optimizer\.lr"):
        prepare("finetune", merged(config, grid={"optimizer.lr": [-1.0]}), folder, "100MB", whole_grid=True)


def merged(config, **changes):
    return type(config).check(merge(config.model_dump(mode="json"), changes))


@pytest.mark.parametrize(
    ("rule", "name", "reason"),
    [
        ("*.jsonl\n", "data/docs.jsonl", "git ignores it"),
        ("", "../docs.jsonl", "it is outside of the folder"),
        ("", "data/hf_token", "a secret by its name"),
    ],
)
def test_a_file_that_would_stay_behind_is_refused(values, folder, rule, name, reason):
    (folder / ".gitignore").write_text(rule)
    if not (folder / name).exists():
        shutil.copy(folder / "data" / "docs.jsonl", folder / name)
    config = pretrain(values, data={"train": {"paths": [name]}})
    with pytest.raises(ConfigError) as error:
        check_paths(config, collect(folder))
    for part in (f"Expected data.train.paths={name} to travel", f"Got {name}, which stays here: {reason}", "give its absolute path"):
        assert part in str(error.value)


def test_a_model_among_ignored_runs_is_refused(folder):
    write = folder / "runs" / "dense" / "export"
    write.mkdir(parents=True)
    (write / "config.json").write_text("{}")
    (folder / ".gitignore").write_text("runs/\n")
    config = CONFIGS["evaluate"].check({"model": {"path": "runs/dense"}, "task": {"type": "docstrings"}})
    with pytest.raises(ConfigError, match=r"Expected model.path=runs/dense to travel"):
        check_paths(config, collect(folder))


def test_all_that_a_config_reads_is_found(values):
    config = pretrain(
        values,
        model={"path": "models/a", "preset": None},
        data={"validation": {"type": "hub", "name": "owner/set"}, "tokenizer": {"type": "pretrained", "path": "gpt2"}},
        sparsity={"masks": "runs/a", "target": 0.0},
    )
    assert dict(paths_of(config)) == {
        "model.path": "models/a",
        "data.train.paths": "data/*.jsonl",
        "data.validation.name": "owner/set",
        "data.tokenizer.path": "gpt2",
        "sparsity.masks": "runs/a",
    }
    data = {"type": "files", "train": "a.csv", "validation": "b.csv", "test": ["c.csv"]}
    tuned = CONFIGS["finetune"].check({"model": {"path": "m"}, "task": {"type": "seq2seq", "data": data, "source": "s", "target": "t"}})
    assert [word for _, word in paths_of(tuned)] == ["m", "a.csv", "b.csv", "c.csv"]


def test_a_comparison_ships_the_files_of_its_stages(values, folder):
    values["run"].pop("name")
    (folder / "stage.yaml").write_text(yaml.safe_dump(values))
    config = CONFIGS["compare"].check({"run": {"folder": "/shared/runs"}, "pretrain": {"files": ["stage.yaml"]}})
    assert check_config(config, collect(folder), False) == []
    assert check_config(merged(config, pretrain={"set": {"data": {"train": {"paths": ["/shared/a.jsonl"]}}}}), collect(folder), False) == [
        "pretrain-dense: data.train.paths=/shared/a.jsonl",
        "pretrain-sparse: data.train.paths=/shared/a.jsonl",
    ]
    (folder / ".gitignore").write_text("stage.yaml\n")
    with pytest.raises(ConfigError, match=r"Expected pretrain.files=stage.yaml to travel"):
        check_config(config, collect(folder), False)
    with pytest.raises(ConfigError, match=r"Set data.cache_dir to an absolute path"):
        check_storage(merged(config, pretrain={"set": {"data": {"cache_dir": "~/cache"}}}), 2)


def test_groups_that_prune_ship_the_files_of_their_stages(folder):
    data = {"type": "folder", "path": "/shared/pairs"}
    common = {"model": {"path": "/shared/m"}, "task": {"type": "seq2seq", "data": data, "metrics": ["chrf"]}, "cache_dir": "/shared/cache"}
    (folder / "tune.yaml").write_text(yaml.safe_dump(common))
    (folder / "prune.yaml").write_text(yaml.safe_dump(common | {"sparsity": {"target": 0.5}}))
    stages = {"prune": {"files": ["prune.yaml"]}, "finetune": {"files": ["tune.yaml"]}}
    run = {"name": "group", "folder": "/shared/runs"}
    taught = {"files": ["tune.yaml"], "set": {"distillation": {"teacher": "/shared/teacher"}}}
    gradual = CONFIGS["gradual"].check(stages | {"run": run, "model": {"path": "/shared/m"}, "levels": [0.5], "finetune": taught})
    recover = CONFIGS["recover"].check(stages | {"run": run, "levels": [0.5], "seeds": [0], "teacher": {"files": ["tune.yaml"]}})
    assert check_config(gradual, collect(folder), False) == [
        "prune-0.5: model.path=/shared/m",
        "prune-0.5: task.data.path=/shared/pairs",
        "tune-0.5: task.data.path=/shared/pairs",
        "tune-0.5: distillation.teacher=/shared/teacher",
    ]  # not the pruned model, which is made on the way
    assert check_config(recover, collect(folder), False)[:2] == ["teacher: model.path=/shared/m", "teacher: task.data.path=/shared/pairs"]
    check_storage(recover, 2)
    for verb, config in (("gradual", gradual), ("recover", recover)):
        assert Submission(verb, config, False, collect(folder)).entrypoint == f"python -m cluster.begin {verb} {CONFIG}"
    with pytest.raises(ConfigError, match=r"Set cache_dir to an absolute path"):
        check_storage(merged(recover, teacher={"set": {"cache_dir": "~/cache"}}), 2)
    with pytest.raises(ConfigError, match=r"Expected run\.workers to divide training\.sequences"):
        check_config(merged(gradual, run={"workers": 2}, finetune={"set": {"training": {"sequences": 3}}}), collect(folder), False)
    (folder / ".gitignore").write_text("prune.yaml\n")
    for config in (gradual, recover):
        with pytest.raises(ConfigError, match=r"Expected prune\.files=prune\.yaml to travel"):
            check_config(config, collect(folder), False)


def test_a_search_ships_the_files_of_its_stages(values, folder):
    values["run"].pop("name")
    (folder / "stage.yaml").write_text(yaml.safe_dump(values))
    data = {"type": "folder", "path": "/shared/pairs"}
    tune = {"model": {"path": "m"}, "task": {"type": "seq2seq", "data": data, "metrics": ["chrf"]}, "cache_dir": "/shared/cache"}
    (folder / "task.yaml").write_text(yaml.safe_dump(tune))
    space = {"sparsity.target": {"choice": [0.0, 0.5]}}
    config = KINDS["tune"].check(
        {
            "run": {"name": "search", "folder": "/shared/runs"},
            "pretrain": {"files": ["stage.yaml"], "space": space},
            "tasks": {"pairs": {"files": ["task.yaml"]}},
        }
    )
    assert check_config(config, collect(folder), False) == ["pairs: task.data.path=/shared/pairs"]  # not the models, which it makes
    assert Submission("tune", config, False, collect(folder)).entrypoint == f"python -m cluster.begin tune {CONFIG} --resume"
    with pytest.raises(ConfigError, match=r"pairs: cache_dir on storage .* Got ~/cache"):
        check_storage(merged(config, tasks={"pairs": {"set": {"cache_dir": "~/cache"}}}), 2)
    with pytest.raises(ConfigError, match=r"optimizer\.lrr: no such key"):
        check_config(merged(config, tasks={"pairs": {"space": {"optimizer.lrr": {"choice": [1]}}}}), collect(folder), False)
    (folder / ".gitignore").write_text("task.yaml\n")
    with pytest.raises(ConfigError, match=r"Expected tasks\.pairs\.files=task\.yaml to travel"):
        check_config(config, collect(folder), False)


@pytest.mark.parametrize(
    ("run", "cache", "num_nodes", "problem"),
    [
        ("/shared/runs", "/shared/cache", 4, None),
        ("/tmp/runs", "~/.cache/raysparse", 1, None),
        ("runs", "/shared/cache", 1, "run.folder .* Got runs: relative, so inside the copy of the working directory that Ray unpacks"),
        ("s3://bucket/runs", "/shared/cache", 1, "run.folder .* Got s3://bucket/runs: an address; raysparse writes plain files"),
        ("/tmp/runs", "/shared/cache", 2, "run.folder .* Got /tmp/runs: of which each of the 2 nodes has its own"),
        ("~/runs", "/shared/cache", 3, "run.folder .* in the home folder, of which each of the 3 nodes has its own"),
        ("/shared/runs", "~/.cache/raysparse", 2, "data.cache_dir .* in the home folder"),
        ("/shared/runs", "cache", 1, "data.cache_dir .* relative"),
        ("/tmpfs/runs", "/shared/cache", 2, None),
    ],
)
def test_the_storage_rule(values, run, cache, num_nodes, problem):
    config = pretrain(values, run={"folder": run}, data={"cache_dir": cache})
    if problem is None:
        check_storage(config, num_nodes)
        return
    with pytest.raises(ConfigError, match=f"Expected {problem}") as error:
        check_storage(config, num_nodes)
    assert "absolute path on a shared file system" in str(error.value)


HEAD, CPU, GPUS = Node("head", {"CPU": 0.0}), Node("a", {"CPU": 7.0}), Node("b", {"CPU": 32.0, "GPU": 4.0})


@pytest.mark.parametrize(
    ("run", "nodes", "holds"),
    [
        ({"workers": 7}, [HEAD, CPU], 7),
        ({"workers": 8}, [HEAD, CPU], None),
        ({"workers": 2, "threads": 3}, [CPU], 2),
        ({"workers": 3, "threads": 3}, [CPU], None),  # 9 of 7 CPU
        ({"workers": 3, "threads": 4}, [CPU, CPU], None),  # 12 of 14 CPU, but a worker stays on its node
        ({"workers": 5}, [CPU, GPUS], 39),  # auto: fewer GPUs than workers, so none
        ({"workers": 4}, [CPU, GPUS], 4),  # auto: a GPU each
        ({"workers": 5, "device": "cuda"}, [CPU, GPUS], None),
        ({"workers": 4, "device": "cuda", "threads": 16}, [GPUS], None),  # 2 of 16 threads fit beside 4 GPUs
        ({"workers": 39, "device": "cpu"}, [CPU, GPUS], 39),
    ],
)
def test_what_a_cluster_holds(run, nodes, holds):
    config = RunConfig(**run)
    if holds is not None:
        assert f"the cluster holds {holds} (" in check_resources(config, nodes, grows=False)
        return
    with pytest.raises(ConfigError, match=r"Expected a cluster that holds .* Got room for \d+: .*Lower run\.workers"):
        check_resources(config, nodes, grows=False)
    assert "its autoscaler has to add nodes" in check_resources(config, nodes, grows=True)


def test_the_arithmetic_is_told():
    with pytest.raises(ConfigError) as error:
        check_resources(RunConfig(workers=8, threads=8, device="cuda"), [HEAD, CPU, GPUS], grows=False)
    for part in (
        "holds 8 workers of 8 CPU and 1 GPU each (run.workers=8, run.threads=8, run.device=cuda)",
        "Got room for 4: head holds 0 (0 CPU), a holds 0 (7 CPU), b holds 4 (32 CPU, 4 GPU)",
        "--autoscaling",
    ):
        assert part in str(error.value)


def test_config_values_never_reach_the_shell(values, folder):
    evil = pretrain(values, run={"folder": "/shared/$(touch gone); rm -rf x"}, data={"cache_dir": "/shared/`id`"})
    submission, _ = prepare("pretrain", evil, folder, "100MB")
    assert submission.entrypoint == "python -m cluster.begin pretrain raysparse-job/config.yaml"
    with pytest.raises(ConfigError, match=r"String should match pattern"):
        pretrain(values, run={"name": "../../etc; rm"})


def test_everything_wrong_is_told_at_once(values, folder):
    (folder / "big.bin").write_bytes(b"0" * 2000)
    config = pretrain(values, run={"workers": 3, "folder": "runs"})
    with pytest.raises(ConfigError) as error:
        prepare("pretrain", config, folder, "1k")
    for part in ("divide training.sequences", "Expected at most 1.0 kB to ship", "run.folder on storage that outlives"):
        assert part in str(error.value)


def test_unchecked_leaves_the_recipe_to_the_cluster(values, folder):
    _, left = prepare("pretrain", pretrain(values, run={"workers": 3}), folder, "100MB", unchecked=True)
    assert left[0] == "the config's own checks (--unchecked)"
