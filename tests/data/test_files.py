import csv
import gzip

import pyarrow
import pytest
import zstandard
from pyarrow import parquet

from raysparse.config import ConfigError
from raysparse.data.files import as_text, kind, read_rows, read_text, resolve
from raysparse.data.sources import Files

ROWS = [{"id": 1, "text": "NA"}, {"id": 2, "text": 'two, "quoted"\nlines'}, {"id": 3, "text": "Café"}]
JSONL = b'{"id": 1, "text": "NA"}\n\n{"id": "x", "text": "b"}\n'


def texts(path, column="text"):
    return [row[column] for _, row in read_rows(path, (column,))]


def test_csv_and_tsv_keep_texts_as_written(tmp_path):
    for name, delimiter in (("a.csv", ","), ("a.tsv", "\t")):
        with (tmp_path / name).open("w", newline="", encoding="utf-8-sig") as file:
            writer = csv.DictWriter(file, ["id", "text"], delimiter=delimiter)
            writer.writeheader()
            writer.writerows(ROWS)
        assert texts(tmp_path / name) == [row["text"] for row in ROWS]
        assert texts(tmp_path / name, "id") == ["1", "2", "3"]


def test_parquet(tmp_path):
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    rows = list(read_rows(tmp_path / "a.parquet", ("text",)))
    assert [row for _, row in rows] == [{"text": row["text"]} for row in ROWS]
    assert rows[2][0] == f"{tmp_path / 'a.parquet'}, row 3"


@pytest.mark.parametrize("pack", [bytes, gzip.compress, zstandard.compress], ids=["plain", "gz", "zst"])
def test_json_lines_may_be_compressed_and_change_the_type_of_other_columns(tmp_path, pack):
    path = tmp_path / ("a.jsonl" + {bytes: "", gzip.compress: ".gz", zstandard.compress: ".zst"}[pack])
    path.write_bytes(pack(JSONL))
    assert texts(path) == ["NA", "b"]
    assert [where for where, _ in read_rows(path, ("text",))] == [f"{path}:1", f"{path}:3"]


def test_long_text_is_cut_at_blank_lines_and_nothing_is_lost(tmp_path):
    text = "".join(f"line {k}\n" + "\n" * (k % 10 == 0) for k in range(5000))
    (tmp_path / "a.txt").write_text(text)
    pieces = list(read_text(tmp_path / "a.txt"))
    assert "".join(pieces) == text
    assert len(pieces) > 2
    assert all(len(piece) >= 16_384 and piece.endswith("\n\n") for piece in pieces[:-1])


def test_resolve_expands_globs_in_order(tmp_path):
    for name in ("b.txt", "a.txt"):
        (tmp_path / name).write_text(name)
    assert [path.name for path in resolve([str(tmp_path / "*.txt"), str(tmp_path / "b.txt")])] == ["a.txt", "b.txt", "b.txt"]
    assert list(Files(paths=str(tmp_path / "*.txt")).documents()) == ["a.txt", "b.txt"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"txt": "b"}\n', r"column 'text' at .*a\.jsonl:2\. Got the columns \['txt'\]"),
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', r"one JSON object a line at .*a\.jsonl:2\. Got: "),
        ("a.jsonl", b'"a"\n', r"a JSON object at .*a\.jsonl:1"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xe9"}\n', r"UTF-8 at .*a\.jsonl:2\. Got: .*0xe9.*Convert"),
        ("a.jsonl.gz", gzip.compress(JSONL * 99)[:-20], r"readable file at .*a\.jsonl\.gz\. Got, at line "),
        ("a.jsonl.gz", JSONL, r"readable file at .*a\.jsonl\.gz\. Got, at line 1: Not a gzipped file"),
        ("a.jsonl.zst", JSONL, r"readable file at .*a\.jsonl\.zst\. Got, at line 1: .*Fetch"),
        ("a.csv", b"id,text\n1,a\n2\n", r"Expected 2 cells, as in the header, at .*a\.csv:3"),
        ("a.csv", b"id,text\n1,a,b\n", r"Expected 2 cells, as in the header, at .*a\.csv:2"),
        ("a.csv", b'id,text\n1,"a\n', r"well-formed CSV at .*a\.csv:2"),
        ("a.csv", b"id,txt\n1,a\n", r"column 'text' at .*a\.csv:2\. Got the columns \['id', 'txt'\]"),
        ("a.parquet", b"no", r"a Parquet file at .*a\.parquet\. Got: "),
        ("a.txt", b"no", r"Expected a table .* Got the text file .*a\.txt"),
        ("a.json", b"[]", r"Expected \.txt, .*Got .*a\.json\. Convert the file"),
        ("a.parquet.gz", b"", r"not Parquet, which compresses itself"),
    ],
)
def test_errors_name_the_file_and_the_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        list(read_rows(tmp_path / name, ("text",)))


def test_a_missing_parquet_column_is_named(tmp_path):
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    with pytest.raises(ConfigError, match=r"column 'body' at .*a\.parquet\. Got the columns \['id', 'text'\]"):
        texts(tmp_path / "a.parquet", "body")


def test_a_pattern_without_files_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match=r"Expected a file, or a glob that matches some, at .*x\*\.txt'\. Got none"):
        resolve([str(tmp_path / "x*.txt")])


def test_a_cell_is_text_or_a_number():
    assert [as_text(value, "f:1", "c") for value in ("a", 1, 2.5)] == ["a", "1", "2.5"]
    for value in (None, True, ["a"]):
        with pytest.raises(ConfigError, match=r"Expected text in column 'c' at f:1\. Got "):
            as_text(value, "f:1", "c")


def test_kind_looks_under_the_compression(tmp_path):
    assert [kind(tmp_path / name) for name in ("a.txt.gz", "a.b.jsonl", "c.csv.zst")] == [".txt", ".jsonl", ".csv"]
