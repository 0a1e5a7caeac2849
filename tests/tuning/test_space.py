"""What a search spans, and everything about it that is wrong before it begins."""

import shlex
import shutil
from pathlib import Path

import pytest

from raysparse.config import ConfigError, load, merge
from raysparse.recipes import CONFIGS
from tuning import check as driver
from tuning.config import SearchConfig
from tuning.domain import Domain, combinations, draw
from tuning.first import Level
from tuning.keys import flat, nested
from tuning.space import Point, Search

SPACES = sorted(Path(__file__).parents[2].glob("tuning/spaces/*.yaml"))
PAPER = {"optimizer.lr": 3, "training.sequences": 4}


def search(values):
    return Search(SearchConfig.check(values))


@pytest.mark.parametrize(
    ("domain", "says"),
    [
        ({}, "Got none"),
        ({"choice": [1], "uniform": [0, 1]}, "Expected one of choice, uniform, loguniform, randint"),
        ({"choice": []}, "at least one value in choice"),
        ({"choice": [1, 2, 1]}, "Got one twice"),
        ({"uniform": [1, 1]}, r"low < high\. Got \[1"),
        ({"loguniform": [0, 1]}, "both above 0"),
        ({"normal": [0, 1]}, "no such key"),
    ],
)
def test_domains_that_are_none(search_values, domain, says):
    values = search_values()
    values["tasks"]["pairs"]["space"] = {"optimizer.lr": domain}
    with pytest.raises(ConfigError, match=says) as error:
        search(values)
    assert "tasks.pairs.space.optimizer.lr" in str(error.value)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"tasks": {"pairs": {"space": {"optimizer.lrr": {"choice": [1]}}}}}, r"(?s)tasks\.pairs at .*optimizer\.lrr: no such key"),
        ({"tasks": {"pairs": {"space": {"optimizer.lr": {"choice": [1e-3, -1.0]}}}}}, r"at optimizer\.lr=-1:"),
        (
            {"tasks": {"pairs": {"space": {"optimizer.eps": {"uniform": [-1.0, 1.0]}}}}, "algorithm": {"type": "random"}},
            r"optimizer\.eps=-1:",
        ),
        ({"pretrain": {"space": {"sparsity.target": {"choice": [0.5, 1.5]}}}}, r"pretrain at sparsity\.target=1\.5:"),
        ({"pretrain": {"space": {"training.warm": {"choice": [0.1, 0.9]}}}}, r"training\.warm: no such key"),
        ({"pretrain": {"space": {"optimizer.lr": {"uniform": [0.1, 0.9]}}}}, r"Got a range for optimizer\.lr"),
        ({"metric": "bleu"}, r"trials of pairs report: validation_loss\. Got bleu"),
        ({"scheduler": {"type": "pbt"}}, "one population. Got 2 cells and grid"),
        ({"scheduler": {"type": "pbt"}, "run": {"workers": 2}}, "cannot hand a checkpoint"),
        ({"scheduler": {"type": "asha"}, "algorithm": {"type": "nsga2"}}, r"scheduler\.type=none with algorithm\.type=nsga2"),
        ({"pretrain": None, "tasks": {}}, "Expected pretrain or tasks"),
        ({"tasks": {"pairs": {"set": {"run": {"name": "one"}}}}}, r"tasks\.pairs without run\.name, which the search sets"),
        ({"tasks": {"pairs": {"space": {"run.seed": {"choice": [1, 2]}}}}}, r"tasks\.pairs without run\.seed"),
        ({"tasks": {"pairs": {"space": {"model.path": {"choice": ["a", "b"]}}}}}, r"tasks\.pairs without model\.path"),
        ({"run": {"workers": 3}}, r"divide training\.sequences"),
        ({"seeds": []}, "seeds"),
    ],
)
def test_searches_that_cannot_be(search_values, changes, says):
    values = merge(search_values(), changes)
    if changes.get("tasks") == {}:
        values["tasks"] = {}
    with pytest.raises(ConfigError, match=says):
        search(values)


def test_an_override_of_a_key_takes_the_place_of_its_values(search_values, tmp_path):
    (tmp_path / "search.yaml").write_text(SearchConfig.check(search_values()).to_yaml())
    words = ["pretrain.space.sparsity.target={choice: [0.5]}", "tasks.pairs.space.optimizer.lr={uniform: [0.1, 0.2]}"]
    found = load(SearchConfig, [tmp_path / "search.yaml"], words)
    assert found.pretrain.space == {"sparsity.target": Domain(choice=(0.5,))}
    assert found.tasks["pairs"].space == {"optimizer.lr": Domain(uniform=(0.1, 0.2))}


def test_a_grid_has_every_combination_at_every_seed(search_values):
    points = search(search_values(seeds=[3, 5])).points()
    assert len(points) == len({point.digest for point in points}) == 2 * 2 * 2
    assert {(p.model["sparsity.target"], p.params["optimizer.lr"], p.seed) for p in points} == {
        (sparsity, lr, seed) for sparsity in (0.0, 0.75) for lr in (1e-2, 1e-9) for seed in (3, 5)
    }


def test_random_points_are_functions_of_the_seed():
    space = {
        "a": Domain(loguniform=(1e-5, 1e-1)),
        "b": Domain(choice=(1, "x")),
        "c": Domain(randint=(2, 5)),
        "d": Domain(uniform=(-1.0, 1.0)),
    }
    drawn = [draw(space, 7, i) for i in range(400)]
    assert drawn == [draw(space, 7, i) for i in range(400)]
    assert drawn != [draw(space, 8, i) for i in range(400)]
    assert all(1e-5 <= point["a"] < 1e-1 and -1 <= point["d"] < 1 for point in drawn)
    assert 150 < sum(point["a"] < 1e-3 for point in drawn) < 250  # half of the decades
    assert {point["b"] for point in drawn} == {1, "x"}
    assert {point["c"] for point in drawn} == {2, 3, 4}


@pytest.mark.parametrize("file", SPACES, ids=lambda file: file.stem)
def test_commands_of_the_shipped_spaces_make_the_trials(file, monkeypatch, tmp_path):
    monkeypatch.chdir(Path(__file__).parents[2])
    found = Search(load(SearchConfig, [file], [f"run.folder={tmp_path}", "algorithm.type=random"]))
    for point in found.points()[::7]:
        program, verb, *words = shlex.split(found.command(point))
        kind = CONFIGS[verb]
        files = [word for word in words if "=" not in word]
        again, trial = load(kind, files, words[len(files) :]), found.trial_config(point)
        assert program == "raysparse"
        assert again.run.name == f"{trial.run.name}-again"
        assert merge(again.model_dump(), {"run": {"name": "", "folder": ""}}) == merge(
            trial.model_dump(), {"run": {"name": "", "folder": ""}}
        )


@pytest.mark.parametrize("file", [file for file in SPACES if file.stem in ("e2e", "webnlg", "dart", "paper")], ids=lambda file: file.stem)
def test_the_papers_grids(file, monkeypatch, tmp_path):
    monkeypatch.chdir(Path(__file__).parents[2])
    found = Search(load(SearchConfig, [file], [f"run.folder={tmp_path}"]))
    assert [model["sparsity.target"] for model, _ in found.first_level()] == [0, 0.5, 0.75]
    for task, space in found.space.items():
        expected = {"optimizer.lr": 6} if task == "curation" else PAPER
        assert {key: len(domain.choice) for key, domain in space.items()} == expected
        grid = found.trial_config(found.some_point(task)).grid
        assert {key: sorted(values) for key, values in grid.items()} == {key: sorted(domain.choice) for key, domain in space.items()}


def test_models_are_shared_by_all_searches_of_a_folder(search_values):
    one, other = search(search_values()), search(search_values(run={"name": "other", "threads": 2}, seeds=[4]))
    assert one.model_config({"sparsity.target": 0.75}).run.path == other.model_config({"sparsity.target": 0.75}).run.path
    third = search(search_values(run={"seed": 1}))
    assert third.model_config({"sparsity.target": 0.75}).run.path != one.model_config({"sparsity.target": 0.75}).run.path
    assert one.model_config({"sparsity.target": 0.75}).run.seed == 0


def test_without_tasks_sparsity_sets_cells_apart(search_values):
    values = search_values(pretrain={"space": {"optimizer.lr": {"choice": [1e-2, 1e-3]}}}, seeds=[0, 1])
    values["tasks"] = {}
    found = search(values)
    assert [point.model for point in found.points()[::4]] == [{"sparsity.target": 0.0}, {"sparsity.target": 0.75}]
    assert len(found.points()) == 2 * 2 * 2
    config = found.trial_config(found.points()[-1])
    assert (config.sparsity.target, config.optimizer.lr, config.run.seed) == (0.75, 1e-3, 1)


def test_without_a_first_level_models_set_cells_apart(search_values):
    values = search_values() | {"pretrain": None}
    values["tasks"]["pairs"]["space"]["model.path"] = {"choice": ["runs/a", "runs/b"]}
    found = search(values)
    assert [cell for _, cell in found.cells()] == [{"model.path": "runs/a"}, {"model.path": "runs/b"}]
    assert {found.trial_config(point).model.path for point in found.points()} == {"runs/a", "runs/b"}


def test_pruned_models_set_cells_apart(pruned_values):
    """The dense one is the model itself, whatever else is set beside sparsity 0, and lifts no masks: it has none."""
    found = search(pruned_values())
    assert found.models("pairs") == [
        {"sparsity.target": 0},
        {"sparsity.target": 0.5, "method.type": "magnitude"},
        {"sparsity.target": 0.5, "method.type": "wanda"},
    ]
    made = [config for _, config in found.first_level()]
    assert [(config.sparsity.target, config.method.type, config.model.path) for config in made] == [
        (0.5, "magnitude", "runs/dense"),
        (0.5, "wanda", "runs/dense"),
    ]
    assert len({config.run.path for config in made}) == 2
    assert {config.run.path.parent for config in made} == {found.path.parent / "pruned"}
    configs = [found.trial_config(Point("pairs", model, {"distillation.feature": 0.5}, 0)) for model in found.models("pairs")]
    assert [(config.model.path, config.sparsity.masks) for config in configs] == [
        ("runs/dense", "lift"),
        *((str(config.run.path), "keep") for config in made),
    ]
    assert {(config.distillation.teacher, config.distillation.feature) for config in configs} == {("runs/dense", 0.5)}
    assert [found.parent(Point("pairs", model, {}, 0)) for model in found.models("pairs")] == [None, *(config.run.path for config in made)]


def test_layers_of_their_own_are_pruned_at_target_0(pruned_values):
    found = search(pruned_values(prune={"set": {"sparsity": {"layers": {"*attn*": 0.5}}}}))
    assert [config.sparsity.target for _, config in found.first_level()] == [0, 0, 0.5, 0.5]


def test_commands_of_pruned_models_make_the_trials(pruned_values):
    found = search(pruned_values())
    for point in found.points():
        _, verb, file, *words = shlex.split(found.command(point))
        assert verb == "finetune"
        assert merge(load(CONFIGS[verb], [file], words).model_dump(), {"run": {"name": "", "folder": ""}}) == merge(
            found.trial_config(point).model_dump(), {"run": {"name": "", "folder": ""}}
        )


def test_every_search_of_a_folder_shares_what_was_pruned(pruned_values):
    def folders(**changes):
        return {config.run.path for _, config in search(pruned_values(**changes)).first_level()}

    assert folders() == folders(run={"name": "other", "threads": 2}, seeds=[4])
    assert not folders() & folders(run={"seed": 1})  # of which samples are drawn
    assert not folders() & folders(prune={"set": {"model": {"path": "runs/other"}}})


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"pretrain": {"files": ["x.yaml"]}}, r"Expected pretrain or prune to make .* Got both\. Drop one"),
        ({"tasks": None}, r"Expected pretrain or tasks\. Got prune alone: it is the tasks"),
        ({"prune": {"space": {"sparsity.target": {"choice": [0.5, 1.5]}}}}, r"prune at .*sparsity\.target=1\.5"),
        ({"prune": {"space": {"sparsity.targets": {"choice": [0.5]}}}}, r"(?s)prune at .*sparsity\.targets: no such key"),
        ({"prune": {"space": {"sparsity.target": {"choice": [0]}}}}, r"Got 0 alone, which is the model as it is\. Add one, or leave prune"),
        ({"prune": {"space": {"model.path": {"choice": ["a", "b"]}}}}, r"one model\.path for all .* Set prune\.set\.model\.path"),
        ({"prune": {"set": {"model": {"path": None, "preset": "debug"}}}}, r"Expected prune\.set\.model\.path: a trained model"),
        ({"prune": {"set": {"run": {"seed": 3}}}}, r"prune without run\.seed, which the search sets"),
        ({"tasks": {"pairs": {"set": {"sparsity": {"masks": "lift"}}}}}, r"tasks\.pairs without sparsity\.masks, .* or leave prune out"),
        ({"tasks": {"pairs": {"set": {"model": {"path": "runs/x"}}}}}, r"tasks\.pairs without model\.path, which the search sets"),
        (
            {"tasks": {"pairs": {"space": {"distillation.feature": {"choice": [0]}}}}},
            r"Expected distillation\.logit or distillation\.feature",
        ),
    ],
)
def test_searches_of_pruned_models_that_cannot_be(pruned_values, changes, says):
    values = merge(pruned_values(), changes)
    values["tasks"] = values["tasks"] or {}
    with pytest.raises(ConfigError, match=says):
        search(values)


def test_a_dense_baseline_is_dense(pruned_values, monkeypatch, tmp_path):
    """The model that is pruned has masks: at sparsity 0 of the search it would be called dense."""
    found = search(pruned_values(prune={"set": {"model": {"path": str(tmp_path)}}}))
    (tmp_path / "masks.safetensors").touch()
    monkeypatch.setattr(Level, "check", lambda level, config: "tokenizer")
    with pytest.raises(ConfigError, match=r"Expected a dense model at .* for sparsity\.target 0 of prune\.space.* Leave 0 out"):
        driver.check(found)


@pytest.mark.parametrize(
    ("cpus", "threads", "workers", "fits"), [((4, 4), 1, 1, 8), ((4, 4), 3, 1, 2), ((4, 4), 3, 2, 1), ((16, 3), 4, 1, 4)]
)
def test_as_many_trials_as_the_nodes_hold(search_values, monkeypatch, cpus, threads, workers, fits):
    import ray

    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": {"CPU": cpu}} for cpu in cpus])
    monkeypatch.setattr(driver, "grows", lambda: False)
    monkeypatch.setattr(driver, "per_worker", lambda run: {"CPU": float(run.threads)})
    config = SearchConfig.check(search_values(run={"threads": threads, "workers": workers}))
    assert driver.concurrency(config) == fits
    assert driver.concurrency(config.model_copy(update={"max_concurrent": 1})) == 1
    nine = config.model_copy(update={"run": config.run.model_copy(update={"workers": 9})})
    with pytest.raises(ConfigError, match=r"hold 9 workers of .* CPU\. Got nodes of .*: room for"):
        driver.concurrency(nine)
    monkeypatch.setattr(driver, "grows", lambda: True)
    assert driver.concurrency(nine) == 1
    assert driver.concurrency(nine.model_copy(update={"max_concurrent": 5})) == 5


def test_another_machine_needs_no_files(search_values, tmp_path):
    plain = search(search_values()).plain
    for file in tmp_path.glob("*.yaml"):
        file.unlink()
    again = Search.of(plain)
    assert again.trial_config(again.points()[0]).task.type == "seq2seq"


def test_flat_and_nested_are_inverse():
    values = {"a": {"b": 1, "c": {"type": "x", "y": 2}}, "d": [1, {"e": 2}]}
    assert nested(dict(flat(values))) == values
    assert list(combinations({"a.b": Domain(choice=(1, 2))}, "")) == [{"a.b": 1}, {"a.b": 2}]


def test_too_little_disk_is_said_with_its_arithmetic(search_values, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 1000))
    with pytest.raises(
        ConfigError,
        match=r"Expected about .* of disk .*2 models \(40 bytes a parameter\) and 3 trials at a time \(40\) .*2 cells.* Got 1\.0 kB free",
    ):
        driver.check_disk(search(search_values()), 3)


def test_folders_of_another_kind_or_search_are_left_alone(search_values, tmp_path):
    config = SearchConfig.check(search_values())
    config.path.mkdir(parents=True)
    (config.path / "precious.txt").write_text("x")
    with pytest.raises(ConfigError, match="Got other files there"):
        driver.check_folder(config, resume=True)
    (config.path / driver.CONFIG).write_text(config.to_yaml())
    with pytest.raises(ConfigError, match="Add --resume"):
        driver.check_folder(config, resume=False)
    driver.check_folder(config.model_copy(update={"tolerance": 3.0}), resume=True)
    with pytest.raises(ConfigError, match=r"Got other values of: seeds"):
        driver.check_folder(config.model_copy(update={"seeds": (1,)}), resume=True)


def test_points_say_what_they_are():
    point = Point("e2e", {"sparsity.target": 0.75}, {"optimizer.lr": 1e-4, "task": {"type": "x" * 60}}, 2)
    assert point.text().startswith('e2e target=0.75 optimizer.lr=0.0001 task={"type": "xxx')
    assert point.text().endswith("... seed=2")
