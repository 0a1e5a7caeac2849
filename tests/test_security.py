"""Files from elsewhere are data: none of them runs anything, and no config value reaches a shell."""

import ast
import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from raysparse.config import ConfigError
from raysparse.data.sources import Hub
from raysparse.data.tokenizer import load as load_tokenizer
from raysparse.models.build import ModelConfig, build
from raysparse.recipes.masks import read_masks
from raysparse.recipes.pretrain import PretrainConfig
from raysparse.train import checkpoint
from raysparse.train.reading import METADATA, Reader
from tests.ranks import spawn
from tests.test_layers import modules
from tests.train.steps import SPARSE, assemble, run

SECTIONS = {"checkpoint": {"every": 0}}


class Evil:
    """Touches a file where it is unpickled without a look."""

    def __init__(self, *how: Any):
        self.how = how

    def __reduce__(self) -> Any:
        return self.how[0], self.how[1:]


def ways(marker: Path) -> dict[str, Evil]:
    return {
        "a shell": Evil(os.system, f"touch {marker}"),
        "Python": Evil(eval, f"__import__('pathlib').Path({str(marker)!r}).touch()"),
        "a method of what may be named": Evil(Path.touch, marker),
        "torch's own loading": Evil(torch.load, str(marker.with_name("evil.pt"))),
    }


WAYS = list(ways(Path("marker")))


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    """A file that must not come to be; beside it lies one that `torch.load` would make it by."""
    file = tmp_path / "marker"
    (tmp_path / "evil.pt").write_bytes(pickle.dumps(Evil(os.system, f"touch {file}")))
    return file


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run on two ranks."""
    folder = tmp_path_factory.mktemp("trained")
    spawn(run, 2, str(folder), SECTIONS, SPARSE)
    return folder


@pytest.fixture
def path(trained: Path, tmp_path: Path) -> Path:
    """A checkpoint, to be tampered with."""
    return shutil.copytree(trained, tmp_path / "run") / "checkpoints" / "step_00000024"


def seal(path: Path) -> None:
    """Make the checkpoint's marker fit what lies there: who tampers with a checkpoint does that too."""
    files = {file.name: [file.stat().st_size, checkpoint.crc32(file)] for file in path.iterdir() if file.name != checkpoint.MARKER}
    (path / checkpoint.MARKER).write_text(json.dumps({"files": files}))


def refused(folder: str) -> str:
    with pytest.raises(ConfigError) as error:
        assemble(folder, SECTIONS, SPARSE)
    return str(error.value)


# --- checkpoints ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
def test_metadata_runs_nothing(path, marker, way):
    (path / METADATA).write_bytes(pickle.dumps({"state_dict_metadata": ways(marker)[way]}))
    seal(path)
    with pytest.raises(ConfigError, match=r"^Expected tensors, numbers and texts alone in .*\.metadata. Got .* Nothing was run\."):
        read_masks(str(path), path.parent)
    assert not marker.exists()


@pytest.mark.filterwarnings("ignore")
def test_these_files_would_run_something_else(path, marker):
    """What the tests here stand on: torch's own reader does run what is in the metadata."""
    (path / METADATA).write_bytes(pickle.dumps(ways(marker)["a shell"]))
    with pytest.raises(AttributeError):
        dcp.FileSystemReader(path).read_metadata()
    assert marker.exists()


def test_a_run_does_not_go_on_from_a_metadata_that_would_run_something(path, marker):
    (path / METADATA).write_bytes(pickle.dumps(ways(marker)["a shell"]))
    seal(path)
    for said in spawn(refused, 2, str(path.parents[1])):
        assert said.startswith(f"Expected tensors, numbers and texts alone in {path / METADATA}. Got posix.system: ")
    assert not marker.exists()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_what_is_no_tensor_runs_nothing(tmp_path, marker, way):
    dcp.save({"extra": ways(marker)[way]}, checkpoint_id=tmp_path / "step", no_dist=True)
    with pytest.raises(ConfigError, match=r"Expected tensors, numbers and texts alone in extra. Got Weights only load failed"):
        checkpoint.extra_of(tmp_path / "step")
    assert not marker.exists()


def test_a_run_does_not_go_on_from_texts_that_would_run_something(path, marker):
    """Another extra in the place of the first, in the file that has it."""
    info = next(info for index, info in Reader(path).read_metadata().storage_data.items() if index.fqn == "extra")
    file = path / info.relative_path
    content, evil = bytearray(file.read_bytes()), pickle.dumps(ways(marker)["a shell"], protocol=2)
    assert len(evil) <= info.length
    content[info.offset : info.offset + info.length] = evil.ljust(info.length, b"\0")
    file.write_bytes(content)
    seal(path)
    for said in spawn(refused, 2, str(path.parents[1])):
        assert said.startswith("Expected tensors, numbers and texts alone in extra. Got Weights only load failed")
    assert not marker.exists()


@pytest.mark.parametrize("name", ["../evil.pt", "/etc/passwd", "below/__0_0.distcp"])
def test_files_elsewhere_are_not_read(path, name):
    metadata = Reader(path).read_metadata()
    next(iter(metadata.storage_data.values())).relative_path = name
    (path / METADATA).write_bytes(pickle.dumps(metadata))
    with pytest.raises(ConfigError, match=rf"Got the file {name}, which is not beside it"):
        checkpoint.stored_shapes(path)


# --- models, tokenizers, data -----------------------------------------------------------------------------------------

CODE = "from pathlib import Path\nPath({marker!r}).touch()\nfrom transformers import GPT2Config as C, GPT2LMHeadModel as M\n"


def test_pickled_weights_run_nothing(tmp_path, marker):
    model = build(ModelConfig(preset="debug"), 0, 50, 16)
    model.config.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "pytorch_model.bin").write_bytes(pickle.dumps(ways(marker)["a shell"], protocol=2))
    with pytest.raises(ConfigError, match=r"Expected a model that transformers can build from .*Weights only load failed"):
        build(ModelConfig(path=str(tmp_path / "model")), 0)
    assert not marker.exists()


@pytest.mark.parametrize("kind", ["gpt2", "unheard_of"])
def test_code_beside_a_model_is_not_run(tmp_path, marker, kind):
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = tmp_path / "model"
    GPT2LMHeadModel(GPT2Config(n_embd=8, n_head=2, n_layer=1, vocab_size=50, n_positions=16)).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    mapped = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": mapped, "model_type": kind}))
    (folder / "evil.py").write_text(CODE.format(marker=str(marker)))
    if kind == "gpt2":  # transformers' own is taken
        build(ModelConfig(path=str(folder)), 0)
    else:
        with pytest.raises(ConfigError, match="Expected a model in Hugging Face format"):
            build(ModelConfig(path=str(folder)), 0)
    assert not marker.exists()


def test_code_beside_a_tokenizer_is_not_run(tmp_path, marker):
    (tmp_path / "tokenizer").mkdir()
    settings = {"auto_map": {"AutoTokenizer": ["evil.C", None]}, "tokenizer_class": "Unheard"}
    (tmp_path / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "tokenizer" / "evil.py").write_text(CODE.format(marker=str(marker)))
    with pytest.raises((OSError, ValueError)):
        load_tokenizer(tmp_path / "tokenizer")
    assert not marker.exists()


@pytest.mark.parametrize("file", ["data.py", "train.pkl", "train.npy"])
def test_a_data_set_runs_nothing(tmp_path, marker, file):
    folder = tmp_path / "data"
    folder.mkdir()
    evil = pickle.dumps(ways(marker)["a shell"])
    (folder / file).write_bytes(CODE.format(marker=str(marker)).encode() if file == "data.py" else evil)
    with pytest.raises(ConfigError, match="Expected the data set"):
        list(Hub(name=str(folder)).documents())
    assert not marker.exists()


# --- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["..", "../up", "a/b", "/abs", "", "$(touch x)", "a;b", "a b", "a\n", "-rf", ".hidden", "`id`", "a\0"])
def test_run_names_are_plain(pretrain_values, name):
    pretrain_values["run"]["name"] = name
    with pytest.raises(ConfigError, match=r"run\.name"):
        PretrainConfig.check(pretrain_values)


# --- sources ----------------------------------------------------------------------------------------------------------

OURS = {"tuning.cells": "a search's own state, which Ray Tune pickles around it: docs/security.md"}
"""Where pickles are read all the same."""


RUNS = ("pickle.load", "pickle.loads", "pickle.Unpickler", "os.system", "os.popen", "eval", "exec", "dcp.load", "yaml.unsafe_load")


def risks(source: str) -> list[str]:
    """Calls that may run what they read, or hand text to a shell."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        given = {word.arg: ast.unparse(word.value) for word in node.keywords}
        last, wrong = name.rpartition(".")[2], None
        if name == "torch.load" and given.get("weights_only") != "True":
            wrong = "without weights_only=True"
        elif name in (
            "pickle.load",
            "pickle.loads",
            "pickle.Unpickler",
            "os.system",
            "os.popen",
            "eval",
            "exec",
            "dcp.load",
            "yaml.unsafe_load",
        ):
            wrong = "runs what it reads"
        elif name in ("dcp.FileSystemReader", "FileSystemReader"):
            wrong = "reads any pickle: train.reading has our own"
        elif name == "yaml.load" and not [argument for argument in node.args[1:] if ast.unparse(argument) == "_Loader"]:
            wrong = "without a safe loader"
        elif given.get("shell", "False") != "False" or last == "getoutput":
            wrong = "through a shell"
        elif last == "from_pretrained" and name.startswith("Auto") and given.get("trust_remote_code") != "False":
            wrong = "without trust_remote_code=False"
        elif given.get("allow_pickle", "False") != "False" or given.get("trust_remote_code", "False") != "False":
            wrong = "runs what it reads"
        elif last == "extractall" and given.get("filter") != "'data'":
            wrong = "without filter='data'"
        if wrong:
            found.append(f"{name} {wrong} (line {node.lineno})")
    return found


def test_no_source_runs_what_it_reads():
    found = {module: risks(file.read_text()) for module, file in modules().items()}
    assert found.pop("raysparse.train.reading") == [f"dcp.load runs what it reads (line {line_of('raysparse.train.reading', 'dcp.load(')})"]
    assert {module for module, lines in found.items() if lines} == OURS.keys()


def line_of(module: str, text: str) -> int:
    lines = modules()[module].read_text().splitlines()
    return next(number for number, line in enumerate(lines, 1) if text in line)


@pytest.mark.parametrize(
    ("source", "bad"),
    [
        ("torch.load(file)", True),
        ("torch.load(file, weights_only=False)", True),
        ("torch.load(file, weights_only=True)", False),
        ("import pickle; pickle.load(file)", True),
        ("subprocess.run(command, shell=True)", True),
        ("subprocess.run(command)", False),
        ("os.system('ls')", True),
        ("yaml.load(text, yaml.Loader)", True),
        ("yaml.load(text, _Loader)", False),
        ("yaml.safe_load(text)", False),
        ("AutoModel.from_pretrained(path)", True),
        ("AutoModel.from_pretrained(path, trust_remote_code=True)", True),
        ("AutoModel.from_pretrained(path, trust_remote_code=False)", False),
        ("archive.extractall(folder)", True),
        ("archive.extractall(folder, filter='data')", False),
        ("np.load(file, allow_pickle=True)", True),
        ("model.eval()", False),
    ],
)
def test_the_reader_of_sources_sees(source, bad):
    assert bool(risks(source)) == bad
