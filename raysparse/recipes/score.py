"""Score the outputs of any system against references, without a model."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from pydantic import TypeAdapter

from raysparse.config import ConfigError, read_yaml
from raysparse.data import files
from raysparse.tasks import AnyTask, Task
from raysparse.tasks.metrics import METRICS, missing
from raysparse.tasks.metrics import score as score_texts
from raysparse.tasks.tables import TableTask, table_rows

KINDS: dict[str, type[Task]] = {kind.model_fields["type"].default: kind for kind in get_args(get_args(AnyTask)[0])}


def score(task: str, outputs: str, references: Sequence[str], metrics: Sequence[str] = ()) -> dict[str, Any]:
    """Scores of a file of outputs.

    Args:
        task: name of a kind of task, or a YAML file with a `task` section (or that section alone).
        outputs: a text file with an output a line, or JSON lines with ``hypothesis``.
        references: files in one of the forms that `read_references` knows.
        metrics: names to compute instead of the task's.
    """
    found = find_task(task)
    names = list(metrics or found.metrics)
    if unknown := [name for name in names if name not in METRICS and name != "perplexity"]:
        raise ConfigError(f"Expected metrics among {', '.join(METRICS)}. Got {', '.join(unknown)}. Correct --metrics.")
    names = [name for name in names if name in METRICS]
    if not names:
        raise ConfigError(f"Expected a task whose scores are of texts. Got {task}, which is judged by perplexity. Choose --metrics.")
    said = read_outputs(Path(outputs))
    right = read_references([Path(path) for path in references], found, len(said))
    if len(said) != len(right):
        where = f"{outputs} has {len(said)}, {' and '.join(references)} {len(right)}"
        raise ConfigError(
            f"Expected as many outputs as examples with references. Got: {where}. Give one output for each example, in order."
        )
    empty = [number for number, texts in enumerate(right, 1) if not texts]
    if empty:
        raise ConfigError(f"Expected a reference for every output. Got none for number {empty[0]} of {references[0]}. Mend the file.")
    absent = missing(names)
    if len(absent) == len(names):
        raise ConfigError(f"Expected a score that this machine can compute. Got {'; '.join(f'{k}, which {v}' for k, v in absent.items())}.")
    return {
        "task": found.type,  # pyrefly: ignore
        "num_examples": len(said),
        "num_references": sum(map(len, right)),
        "num_empty_outputs": sum(not text.strip() for text in said),
        "scores": score_texts(names, said, right),
        "missing": absent,
    }


def show(facts: dict[str, Any]) -> str:
    lines = [f"{facts['num_examples']:,} outputs, {facts['num_references']:,} references ({facts['task']})"]
    if facts["num_empty_outputs"]:
        lines.append(f"{facts['num_empty_outputs']:,} outputs are empty")
    lines += [f"{name:<14} {value:8.4f}" for name, value in facts["scores"].items()]
    return "\n".join(lines + [f"{name:<14} not computed: it {reason}" for name, reason in facts["missing"].items()])


def find_task(task: str) -> Task:
    """A kind of task with its defaults, or the task of a config file."""
    if task in KINDS:
        return KINDS[task].model_construct()
    if not Path(task).is_file():
        raise ConfigError(f"Expected a task: {', '.join(KINDS)}, or a YAML file with a task section. Got {task!r}. Correct --task.")
    values = read_yaml(Path(task))
    holder = values.get("task", values)
    if not isinstance(holder, dict) or holder.get("type") not in KINDS:
        raise ConfigError(
            f"Expected a task section with a type among {', '.join(KINDS)} in {task}. Got {sorted(values)}. Correct the file."
        )
    KINDS[holder["type"]].check(holder)
    return TypeAdapter(AnyTask).validate_python(holder)


def read_outputs(path: Path) -> list[str]:
    """One output a line, or of JSON lines the column ``hypothesis``."""
    _present(path)
    if files.kind(path) in files.TABLES:
        return [files.as_text(row["hypothesis"], where, "hypothesis") for where, row in files.read_rows(path, ("hypothesis",))]
    return files.read_lines(path)


def read_references(paths: Sequence[Path], task: Task, count: int) -> list[list[str]]:
    """References of each example, in one of these forms:

    - several text files: line k of each belongs to example k, a blank line is none;
    - one text file with blank lines in it: a block of lines for each example; without blank lines one reference a line;
    - a table with the column ``references`` (`predictions.jsonl` of an evaluation too), or the task's own data.
    """
    for path in paths:
        _present(path)
    if files.kind(paths[0]) in files.TABLES:
        if len(paths) > 1:
            raise ConfigError(
                f"Expected one table of references, or text files. Got {len(paths)} files. Put the references into one table."
            )
        columns = set(files.columns(paths[0]))
        if isinstance(task, TableTask) and any(columns.issuperset(layout) for layout in task.layouts):
            return [list(example.references) for example in task.grouped(table_rows(paths[0], task.layouts), "test")]
        return [files.as_texts(row["references"], where, "references") for where, row in files.read_rows(paths[0], ("references",))]
    streams = [files.read_lines(path) for path in paths]
    if len(paths) > 1:
        sizes = {len(stream) for stream in streams}
        if len(sizes) > 1:
            told = ", ".join(f"{path} {len(stream)}" for path, stream in zip(paths, streams, strict=True))
            raise ConfigError(f"Expected reference files of equally many lines, blank ones where there is no reference. Got {told}.")
        return [[text for text in right if text.strip()] for right in zip(*streams, strict=True)]
    (lines,) = streams
    if len(lines) == count and all(line.strip() for line in lines):
        return [[line] for line in lines]
    blocks: list[list[str]] = [[]]
    for line in lines:
        if line.strip():
            blocks[-1].append(line)
        elif blocks[-1]:
            blocks.append([])
    blocks = [block for block in blocks if block]
    return blocks if len(blocks) > 1 or count == 1 else [[line] for line in lines if line.strip()]


def _present(path: Path) -> None:
    if not path.is_file():
        raise ConfigError(f"Expected a file at {path}. Got none (looked from {Path.cwd()}). Correct the path.")
