"""Imports point down only: the layers of docs and house style, held by reading every import, those in functions too."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

LEVELS = [
    {"raysparse"},  # the version
    {"config"},
    {"length"},
    {"kernels"},
    {"sparsity"},
    {"models", "data", "tasks", "losses"},
    {"train"},
    {"recipes", "report"},
    {"runtime"},
    {"tuning", "cluster", "__main__"},
]
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names}

FORBIDDEN = {
    name: {"ray"} | ({"transformers", "torch.distributed", "fairscale", "datasets"} if LEVEL[name] <= LEVEL["sparsity"] else set())
    for name in LEVEL
    if name not in ("runtime", "tuning", "cluster")
}
"""What a layer may not import from outside."""


def layer_of(module: str) -> str | None:
    """`raysparse.train.loop` -> train; None for what is not ours."""
    parts = module.split(".")
    if parts[0] in ("tuning", "cluster"):
        return parts[0]
    return None if parts[0] != "raysparse" else (parts[1] if len(parts) > 1 else "raysparse")


def imports(source: str) -> Iterator[str]:
    """Every imported module of a file; `from a import b` as a.b, for b may be a module."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "Expected absolute imports."
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def violations(module: str, source: str) -> list[str]:
    here = layer_of(module)
    assert here in LEVEL, f"Expected {module} in a layer of {__file__}."
    found = []
    for name in imports(source):
        there = layer_of(name)
        if there in LEVEL and LEVEL[there] > LEVEL[here]:
            found.append(f"{module} ({here}) imports {name} ({there}), which is above it")
        found += [f"{module} imports {name}" for top in FORBIDDEN.get(here, ()) if f"{name}.".startswith(f"{top}.")]
    return found


def modules() -> dict[str, Path]:
    files = [file for top in ("raysparse", "tuning", "cluster") for file in sorted((ROOT / top).rglob("*.py"))]
    return {".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file for file in files}


def test_imports_point_down():
    found = modules()
    assert {"raysparse", "raysparse.config", "raysparse.train.loop", "raysparse.__main__"} <= set(found)
    assert [line for module, file in found.items() for line in violations(module, file.read_text())] == []


@pytest.mark.parametrize(
    ("module", "source", "bad"),
    [
        ("raysparse.train.loop", "import ray", True),
        ("raysparse.train.loop", "def f():\n    from ray.train import report", True),
        ("raysparse.train.loop", "import raylib, torch.distributed", False),
        ("raysparse.train.loop", "from raysparse import recipes", True),
        ("raysparse.train.loop", "from raysparse.recipes.job import Job", True),
        ("raysparse.train.loop", "from raysparse.sparsity import select; from raysparse import __version__", False),
        ("raysparse.sparsity.select", "from torch import distributed", True),
        ("raysparse.sparsity.select", "if x:\n    import torch.distributed as dist", True),
        ("raysparse.sparsity.select", "import transformers", True),
        ("raysparse.sparsity.select", "from raysparse.data.batch import Batch", True),
        ("raysparse.tasks.tables", "from raysparse.data.batch import Batch", False),
        ("raysparse.config", "import raysparse.sparsity", True),
        ("raysparse.recipes.pretrain", "from raysparse.runtime.launch import launch", True),
        ("raysparse.__main__", "def f():\n    from raysparse.runtime.launch import launch", False),
        ("raysparse.__main__", "import ray", True),
        ("raysparse.report.page", "import ray.train", True),
        ("raysparse.runtime.launch", "import ray; from raysparse.recipes import job", False),
        ("raysparse.runtime.launch", "import tuning.search", True),
        ("tuning.search", "import ray; from raysparse.runtime.launch import launch", False),
    ],
)
def test_the_reader_sees(module, source, bad):
    assert bool(violations(module, source)) == bad


def test_a_new_package_needs_a_layer():
    with pytest.raises(AssertionError, match="in a layer"):
        violations("raysparse.helpers.misc", "")


BLOCKED = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked}:
            raise ModuleNotFoundError("No module named " + repr(name), name=name)

sys.meta_path.insert(0, Blocker())
import raysparse.train.loop, raysparse.recipes, raysparse.runtime.local, raysparse.__main__
raysparse.recipes.CONFIGS["pretrain"].check({{"model": {{"preset": "debug"}}}})
found = sorted({blocked} & {{name.split(".")[0] for name in sys.modules}})
assert not found, found
print("ok")
"""


def test_training_needs_neither_ray_nor_fairscale_nor_tensorboard_nor_torchao():
    """A GPU machine may have none of them."""
    code = BLOCKED.format(blocked={"ray", "fairscale", "tensorboard", "torchao"})
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "ok\n"), done.stderr
