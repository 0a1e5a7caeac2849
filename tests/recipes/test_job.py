"""A run's name belongs to one config: what may change when it is resumed, what may not, and who drives it."""

import json
from pathlib import Path

import pytest

from raysparse.config import ConfigError
from raysparse.recipes.job import Job, check_claim, finished, open_job
from raysparse.recipes.pretrain import PretrainConfig
from raysparse.train.error import TrainingError


def config(folder: Path, **sections) -> PretrainConfig:
    """A small run `mine` below `folder`."""
    values = {"run": {"name": "mine", "folder": str(folder)}, "model": {"preset": "debug"}, "sparsity": {"target": 0.5}}
    return PretrainConfig.check({name: values.get(name, {}) | sections.get(name, {}) for name in values | sections})


def opened(folder: Path, verb: str = "pretrain", **sections) -> Job:
    settings = config(folder, **sections)
    return open_job(verb, settings, settings.run, {"tokens": 5})


def test_a_new_run(tmp_path):
    settings = config(tmp_path)
    job = open_job("pretrain", settings, settings.run, {"tokens": 5})
    assert (job.verb, job.prepared, job.path) == ("pretrain", {"tokens": 5}, tmp_path / "mine")
    assert PretrainConfig.check(job.config) == settings
    assert json.loads(json.dumps(job.config)) == job.config  # plain data: it travels
    assert (job.path / "config.yaml").read_text() == settings.to_yaml()
    assert sorted(file.name for file in job.path.iterdir()) == [
        "claim",
        "config.yaml",
        "content.json",
        "driver.1.json",
        "identity.json",
    ]  # nothing half-written
    check_claim(job)


@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"run": {"workers": 2}},
        {"run": {"threads": 2}},
        {"run": {"device": "cpu"}},
        {"run": {"max_failures": 0}},
        {"logging": {"every": "1 step", "histograms": "0 steps", "tensorboard": False}},
        {"checkpoint": {"keep": 5, "every": "3 steps", "asynchronous": False}},
    ],
    ids=str,
)
def test_resumes_with_other_values_of_what_changes_no_result(tmp_path, sections):
    first, second = opened(tmp_path), opened(tmp_path, **sections)
    assert second.path == first.path
    assert second.config == config(tmp_path, **sections).model_dump(mode="json")
    assert (second.path / "config.yaml").read_text() == config(tmp_path, **sections).to_yaml()
    opened(tmp_path)  # and back


@pytest.mark.parametrize(
    ("sections", "changed"),
    [
        ({"sparsity": {"target": 0.75}}, "sparsity.target"),
        ({"run": {"seed": 1}}, "run.seed"),
        ({"run": {"precision": "bfloat16"}}, "run.precision"),
        ({"run": {"parity": True}}, "run.parity"),
        ({"sparsity": {"distribution": {"type": "er"}}}, "sparsity.distribution.type"),
        ({"sparsity": {"layers": {"h.0.*": 0.5}}}, "sparsity.layers.h.0.*"),
        ({"optimizer": {"lr": 1e-3}, "training": {"length": 7, "sequences": 16}}, "optimizer.lr, training.length, training.sequences"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refuses_another_config_under_the_name(tmp_path, sections, changed):
    job = opened(tmp_path)
    before = {file.name: file.read_text() for file in job.path.iterdir()}
    with pytest.raises(ConfigError) as error:
        opened(tmp_path, **sections)
    assert str(error.value) == (
        f"Expected run.name=mine to be new, or its config to be as it was. Got other values of: {changed}. "
        f"Choose another run.name, go back to that config ({job.path}/config.yaml), or delete the folder {job.path}."
    )
    assert {file.name: file.read_text() for file in job.path.iterdir()} == before  # a refused start takes nothing over
    check_claim(job)
    assert opened(tmp_path, run={"name": "other"}, **{k: v for k, v in sections.items() if k != "run"}).path == tmp_path / "other"


def test_refuses_the_name_of_another_verb(tmp_path):
    opened(tmp_path)
    with pytest.raises(ConfigError, match=r"Got other values of: verb\. "):
        opened(tmp_path, verb="finetune")


def test_refuses_a_foreign_folder(tmp_path):
    (tmp_path / "mine").mkdir()
    opened(tmp_path)  # an empty folder is welcome
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "thesis.tex").touch()
    with pytest.raises(ConfigError) as error:
        opened(tmp_path, run={"name": "theirs"})
    assert str(error.value) == (
        f"Expected {tmp_path}/theirs to be a raysparse run, or empty. Got other files there. Choose another run.name."
    )
    assert [file.name for file in (tmp_path / "theirs").iterdir()] == ["thesis.tex"]


def test_refuses_a_damaged_identity(tmp_path):
    job = opened(tmp_path)
    (job.path / "identity.json").write_text('{"verb": ')
    with pytest.raises(ConfigError, match=r"^Expected JSON in .*/mine/identity\.json\. Got: .*\. Choose another run\.name\.$"):
        opened(tmp_path)


def test_the_newer_driver_goes_on(tmp_path):
    older, newer = opened(tmp_path), opened(tmp_path)
    check_claim(newer)
    with pytest.raises(TrainingError) as error:
        check_claim(older)
    assert str(error.value) == f"Expected to be the only driver of {tmp_path}/mine. Got a newer one, which goes on. Nothing to do."


def test_finished(tmp_path):
    job = opened(tmp_path)
    assert finished(job) is None
    (job.path / "summary.json").write_text('{"loss": 3.0}')
    assert finished(job) == {"loss": 3.0}


@pytest.mark.parametrize("name", ["", ".hidden", "a/b", "../a", "-x", "a b"])
def test_names_that_are_no_folder(tmp_path, name):
    with pytest.raises(ConfigError, match=r"\n  run\.name: String should match pattern "):
        opened(tmp_path, run={"name": name})
