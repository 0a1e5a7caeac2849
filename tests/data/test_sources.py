import json

import pytest

from raysparse.config import ConfigError
from raysparse.data import sources
from raysparse.data.sources import Files, Hub, PythonStdlib, stdlib_names, stdlib_split


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A standard library of 40 modules of 100 bytes, one file that is not UTF-8, and folders to be left out."""
    for k in range(40):
        (tmp_path / f"m{k}.py").write_text(f"# {k:097}\n")
    for name in ("site-packages/a.py", "pkg/__pycache__/b.py", "pkg/c.txt", "pkg/d.bin"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "latin.py").write_bytes(b"# \xe9")
    (tmp_path / "empty.py").write_text("\n")
    monkeypatch.setattr(sources, "stdlib_root", lambda: tmp_path)
    return tmp_path


def test_the_library_is_its_text_files_in_order(library):
    names = stdlib_names()
    assert names == sorted(names)
    assert {"pkg/c.txt", "m0.py", "latin.py"} < set(names)
    assert not {"site-packages/a.py", "pkg/__pycache__/b.py", "pkg/d.bin"} & set(names)
    documents = list(PythonStdlib(exclude_task_splits=False).documents())
    assert len(documents) == 41
    assert "pkg/c.txt" in documents


def test_modules_of_the_task_splits_are_left_out(library):
    held_out = [name for name in stdlib_names() if stdlib_split(name) != "train"]
    kept = list(PythonStdlib().documents())
    assert held_out
    assert all((library / name).read_bytes().decode("latin-1") not in kept for name in held_out)
    assert len(kept) == 41 - len(set(held_out) - {"latin.py", "empty.py"})


def test_max_bytes_takes_a_fixed_choice_that_fits(library):
    small, large = (list(PythonStdlib(max_bytes=size).documents()) for size in (500, 1500))
    assert 0 < sum(map(len, small)) <= 500
    assert set(small) < set(large)
    assert small != sorted(PythonStdlib().documents())[: len(small)]


def test_fingerprints_follow_the_content(library, tmp_path):
    before = PythonStdlib().fingerprint()
    assert PythonStdlib().fingerprint() == before != PythonStdlib(max_bytes=500).fingerprint()
    name = next(name for name in stdlib_names() if stdlib_split(name) == "train")
    (library / name).write_text("changed")
    assert PythonStdlib().fingerprint() != before

    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a", "body": "a"}\n')
    first = Files(paths=(str(path),)).fingerprint()
    assert Files(paths=(str(path),), column="body").fingerprint() != first
    path.write_text('{"text": "b", "body": "a"}\n')
    assert Files(paths=(str(path),)).fingerprint() != first


@pytest.mark.parametrize("streaming", [True, False])
def test_a_folder_is_read_as_a_hub_data_set(tmp_path, monkeypatch, streaming):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [{"body": f"document {k}"} for k in range(5)] + [{"body": " "}]
    (tmp_path / "set").mkdir()
    path = tmp_path / "set" / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = Hub(name=str(path.parent), column="body", streaming=streaming)
    assert list(source.documents()) == [f"document {k}" for k in range(5)]
    before = source.fingerprint()
    path.write_text('{"body": "other"}\n')
    assert source.fingerprint() != before


def test_hub_errors_name_what_was_asked_for(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"body": "a"}\n')
    with pytest.raises(ConfigError, match=r"column 'text' at .*, train, row 1\. Got the columns \['body'\]"):
        list(Hub(name=str(tmp_path)).documents())
    with pytest.raises(ConfigError, match=r"Expected the data set .*split 'nope'\. Got: .*nope"):
        list(Hub(name=str(tmp_path), split="nope").documents())
