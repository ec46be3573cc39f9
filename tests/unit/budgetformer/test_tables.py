"""Tables of texts are read row by row, and errors name file, row and line."""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from budgetformer import tables as module
from budgetformer.errors import DataError
from budgetformer.tables import Row, find_table, lines_of, open_table
from tests.support.tables import ENDS, KINDS, TEXT_KINDS, of_texts, write

TEXTS = ["one", "two, with a comma", 'three "quoted"', "four\nlines\r\n", "", "fünf 🦊", "  six "]


def error_of(path: Path) -> str:
    """Return the message of the error that reading a file raises."""
    with pytest.raises(DataError) as caught:
        list(open_table(path))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("paired", [False, True])
def test_rows_are_read_as_they_were_written(tmp_path: Path, kind: str, paired: bool) -> None:
    rows: list[Row] = [(text, text[::-1] if paired else None) for text in TEXTS]
    table = open_table(write(tmp_path / f"rows.{kind}", of_texts(TEXTS, paired)))
    assert list(table) == rows
    assert table.position == table.size > 0


@pytest.mark.parametrize("kind", TEXT_KINDS)
def test_a_file_is_read_only_as_far_as_needed(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path / f"rows.{kind}", of_texts(["word " * 100] * 20_000))
    rows = open_table(path)
    assert len(list(itertools.islice(iter(rows), 100))) == 100
    assert rows.position <= 2 * module.READ_BYTES < rows.size


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("size", [1, 2, 3, 7])
@pytest.mark.parametrize("kind", TEXT_KINDS)
def test_line_ends_may_be_split_between_two_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, size: int, end: str
) -> None:
    monkeypatch.setattr(module, "READ_BYTES", size)
    path = write(tmp_path / f"rows.{kind}", of_texts(TEXTS), end=end, bom=True)
    assert [text for text, _ in open_table(path)] == TEXTS


@pytest.mark.parametrize("end", ENDS)
def test_blank_lines_are_skipped(tmp_path: Path, end: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(end.join(['{"text": "a"}', "", "  ", '{"text": "b", "n": [1]}']).encode())
    assert [text for text, _ in open_table(path)] == ["a", "b"]
    path = tmp_path / "rows.csv"
    path.write_bytes(end.join(["", "text,n", "a,1", "", "b,2", ""]).encode())
    assert [text for text, _ in open_table(path)] == ["a", "b"]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_null_pairs_mean_no_pairs(tmp_path: Path, kind: str) -> None:
    records = [{"text": text, "text_pair": None} for text in TEXTS]
    path = write(tmp_path / f"rows.{kind}", records)
    assert list(open_table(path)) == [(text, None) for text in TEXTS]


@pytest.mark.parametrize("kind", ["string", "large_string", "string_view", "dictionary"])
def test_every_string_type_of_parquet_is_read(tmp_path: Path, kind: str) -> None:
    array = pa.array(["b", "a", "b"])
    types = {"large_string": pa.large_string(), "string_view": pa.string_view()}
    column = (
        array.dictionary_encode() if kind == "dictionary" else array.cast(types.get(kind, "string"))
    )
    path = tmp_path / "rows.parquet"
    parquet.write_table(pa.table({"text": column, "text_pair": column}), path)
    assert list(open_table(path)) == [("b", "b"), ("a", "a"), ("b", "b")]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.csv", b"", "empty, not even a header"),
        ("rows.csv", b"\n\n", "empty, not even a header"),
        ("rows.csv", b"words\nhello\n", "no column 'text' (it has 'words')"),
        ("rows.csv", b"Text, text\na,b\n", "no column 'text' (it has 'Text', ' text')"),
        ("rows.csv", b"text,text\na,b\n", "more than one column 'text'"),
        ("rows.csv", b"text,id,id\na,1,2\n", "more than one column 'id'"),
        ("rows.csv", b"id,text\n1,a\n2\n", "row 2 (line 3): 1 field, the header has 2"),
        ("rows.csv", b"id,text\n1,a\n2,b,c\n", "row 2 (line 3): 3 fields, the header has 2"),
        ("rows.csv", b'id,text\n1,"a\nb"\n\n2\n', "row 2 (line 5): 1 field, the header has 2"),
        ("rows.csv", b'text\nfine\n"begun\nmore\n', "row 2 (line 3): not CSV: unexpected end"),
        ("rows.csv", b'text\nfine\n"a"b\n', "row 2 (line 3): not CSV"),
        ("rows.csv", b'te"xt\n"a"b\n', "no column 'text'"),
        ("rows.csv", b'"te\xe9xt"\na\n', "header (line 1): byte 0xe9 at offset 3 is not UTF-8"),
        ("rows.csv", b"text\nfine\n\xff\n", "row 2 (line 3): byte 0xff at offset 10 is not UTF-8"),
        ("rows.csv", "text\na\n".encode("utf-16"), "UTF-16"),
        ("rows.csv", "text\na\n".encode("utf-16-be"), "no column 'text'"),
        ("rows.csv", b"\xfe\xff" + "text\na\n".encode("utf-16-be"), "UTF-16"),
        ("rows.jsonl", '{"text": "a"}\n'.encode("utf-16"), "UTF-16"),
        ("rows.jsonl", '{"text": "a"}\n'.encode("utf-32"), "UTF-32"),
        ("rows.jsonl", b'{"text": "a"}\n{"text": 5}\n',
         "row 2 (line 2): column 'text' holds an integer, not a string"),
        ("rows.jsonl", b'{"text": ["a"]}', "column 'text' holds a list, not a string"),
        ("rows.jsonl", b'{"text": {"a": 1}}', "column 'text' holds an object, not a string"),
        ("rows.jsonl", b'{"text": true}', "column 'text' holds a boolean, not a string"),
        ("rows.jsonl", b'{"text": 1.5}', "column 'text' holds a floating-point number"),
        ("rows.jsonl", b'{"text": null}', "row 1 (line 1): column 'text' holds null"),
        ("rows.jsonl", b'{"text": "a"}\n\n{"words": "b"}\n',
         "row 2 (line 3): no column 'text' (it has 'words')"),
        ("rows.jsonl", b"{}\n", "no column 'text' (it has no columns)"),
        ("rows.jsonl", b'{"text": "a"}\n[1]\n', "row 2 (line 2): a list, but each line"),
        ("rows.jsonl", b'[{"text": "a"},\n{"text": "b"}]\n', "row 1 (line 1): not JSON"),
        ("rows.jsonl", b'{"text": "a"},\n', "row 1 (line 1): not JSON: Extra data"),
        ("rows.jsonl", b'{\n"text": "a"\n}\n', "row 1 (line 1): not JSON"),
        ("rows.jsonl", b'{"text": "a"}\n{"text": "b', "row 2 (line 2): not JSON"),
        ("rows.jsonl", b'{"text": "a", "text": "b"}', "the key 'text' occurs more than once"),
        ("rows.jsonl", b'{"text": "a", "n": NaN}', "row 1 (line 1): not JSON: NaN"),
        ("rows.jsonl", b'{"text": "a", "n": -Infinity}', "not JSON: -Infinity"),
        ("rows.jsonl", b'{"text": "a", "n": ' + b"[" * 100_000, "nested too deeply"),
        ("rows.jsonl", b'{"text": "\xff"}\n', "row 1 (line 1): byte 0xff at offset 10"),
        ("rows.jsonl", b'{"text": "\\ud800"}\n', "half of a surrogate pair"),
        ("rows.jsonl", b'{"text": "a", "text_pair": "b"}\n{"text": "c"}\n',
         "row 2 (line 2): column 'text_pair' holds null, not a string"),
        ("rows.jsonl", b'{"text": "a"}\n{"text": "b", "text_pair": "c"}\n',
         "row 2 (line 2): column 'text_pair' has a value, it was null in the first row"),
        ("rows.parquet", b"PAR1, or not", "rows.parquet"),
        ("rows.parquet", b"", "rows.parquet"),
        ("rows.txt", b"hello", "not a .parquet, .csv or .jsonl file"),
        ("rows.csv.gz", b"hello", "not a .parquet, .csv or .jsonl file"),
    ],
)  # fmt: skip
def test_an_invalid_file_is_refused_with_its_fault(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    assert message in error_of(path)


@pytest.mark.parametrize(
    ("column", "kind"),
    [
        (pa.array([1, 2]), "int64"),
        (pa.array([0.5, None]), "double"),
        (pa.array([True, False]), "bool"),
        (pa.array([b"a", b"b"]), "binary"),
        (pa.array([["a"], ["b"]]), "list"),
        (pa.array([{"a": 1}, None]), "struct"),
        (pa.array(np.array(["2020-01-01", "2021-01-01"], dtype="datetime64[ms]")), "timestamp"),
        (pa.array([1, 2]).dictionary_encode(), "int64"),
        (pa.nulls(2), "null"),
    ],
)
def test_a_parquet_column_of_another_type_is_refused(
    tmp_path: Path, column: Any, kind: str
) -> None:
    path = tmp_path / "rows.parquet"
    parquet.write_table(pa.table({"text": column}), path)
    assert f"column 'text' has type {kind}" in error_of(path)
    if kind != "null":
        parquet.write_table(pa.table({"text": ["a", "b"], "text_pair": column}), path)
        assert f"column 'text_pair' has type {kind}" in error_of(path)


def test_duplicate_parquet_columns_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    columns = [pa.array(["a"]), pa.array(["b"])]
    parquet.write_table(pa.Table.from_arrays(columns, names=["text", "text"]), path)
    assert "more than one column 'text'" in error_of(path)


def test_invalid_utf8_in_parquet_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    raw = pa.array([b"fine"] * 4 + [b"\xff"])
    column = pa.Array.from_buffers(pa.string(), 5, raw.buffers())
    parquet.write_table(pa.table({"text": column}), path)
    assert "row 5: " in error_of(path)


@pytest.mark.parametrize("name", ["none.csv", "none.jsonl", "none.parquet"])
def test_a_missing_file_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match=name):
        open_table(tmp_path / name)


@pytest.mark.parametrize("name", ["folder", "folder.csv", "folder.parquet"])
def test_a_folder_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    with pytest.raises(DataError, match="a folder; name a"):
        open_table(tmp_path / name)


def test_find_table_finds_the_only_table_of_a_name(tmp_path: Path) -> None:
    assert find_table(tmp_path, "test") is None
    (tmp_path / "test.txt").touch()
    (tmp_path / "test.more.csv").touch()
    assert find_table(tmp_path, "test") is None
    (tmp_path / "test.CSV").touch()
    assert find_table(tmp_path, "test") == tmp_path / "test.CSV"
    (tmp_path / "test.jsonl").touch()
    with pytest.raises(DataError, match=r"both test\.CSV and test\.jsonl"):
        find_table(tmp_path, "test")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.csv", lambda size: b'text\n"' + b"lots of words\n" * (size // 10)),  # no end quote
        ("rows.csv", lambda size: b"text\n" + b"x" * (size + 1)),
        ("rows.jsonl", lambda size: b'{"text": "' + b"x" * size),
        ("rows.jsonl", lambda size: b'{"text": "' + b"x" * size + b'"}\n' + b'{"text": ""}\n'),
    ],
)
@pytest.mark.parametrize("read", [2**20, 1000])
def test_a_row_too_large_for_memory_is_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    content: Callable[[int], bytes],
    read: int,
) -> None:
    monkeypatch.setattr(module, "MAX_ROW_BYTES", 10_000)
    monkeypatch.setattr(module, "READ_BYTES", read)
    path = tmp_path / name
    path.write_bytes(content(10_000))
    message = error_of(path)
    assert "10000" in message
    assert "row 1 " in message


def test_lines_of_stdin_are_rows() -> None:
    def lines(content: bytes) -> list[Row]:
        return list(lines_of(io.BytesIO(content)))

    assert lines("ä\r\n\nb".encode()) == [("ä", None), ("", None), ("b", None)]
    assert lines(b"\xef\xbb\xbfa\rb\r\n") == [("a", None), ("b", None)]
    with pytest.raises(DataError, match="stdin, line 2: byte 0xff at offset 5 is not UTF-8"):
        lines(b"fine\n\xff\n")
    with pytest.raises(DataError, match="stdin, line 1: UTF-16"):
        lines("fine\n".encode("utf-16"))
