"""Rows of files, read lazily."""

from __future__ import annotations

import csv
import io
import itertools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from budgetformer.bulk import lines_of, open_rows
from budgetformer.bulk import rows as module
from budgetformer.bulk.rows import Row
from budgetformer.errors import DataError

TEXTS = ["one", "two, with a comma", 'three "quoted"', "four\nlines\r\n", "", "fünf 🦊", "  six "]
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


def write(path: Path, rows: list[Row]) -> Path:
    paired = any(pair is not None for _, pair in rows)
    table = [{"text": t, "text_pair": p} if paired else {"text": t} for t, p in rows]
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in table))
    elif path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            out = csv.DictWriter(file, ["id", "text", "text_pair"] if paired else ["id", "text"])
            out.writeheader()
            out.writerows({"id": str(i), **row} for i, row in enumerate(table))
    else:
        pyarrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.Table.from_pylist(table), path, row_group_size=3)
    return path


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize("paired", [False, True])
def test_rows_come_back_as_they_were(tmp_path: Path, kind: str, paired: bool) -> None:
    rows: list[Row] = [(text, text[::-1] if paired else None) for text in TEXTS]
    found = open_rows(write(tmp_path / f"rows.{kind}", rows))
    assert list(found) == rows
    assert found.position == found.size > 0


@given(st.lists(texts, min_size=1, max_size=8))
def test_any_text_survives_csv(tmp_path_factory: pytest.TempPathFactory, given: list[str]) -> None:
    rows: list[Row] = [(text, None) for text in given]
    path = write(tmp_path_factory.mktemp("any") / "rows.csv", rows)
    assert list(open_rows(path)) == rows


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_a_file_is_read_as_far_as_it_is_asked_for(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path / f"rows.{kind}", [("word " * 100, None)] * 20_000)
    rows = open_rows(path)
    drawing = iter(rows)
    assert len(list(itertools.islice(drawing, 100))) == 100
    assert rows.position <= 2 * module.READ_BYTES < rows.size


def test_a_spreadsheets_byte_order_mark_is_no_part_of_a_name(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes('\ufeff"text",id\r\nhello,1\r\n'.encode())
    assert list(open_rows(path)) == [("hello", None)]


def test_blank_lines_are_no_rows(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"}\n\n  \n{"text": "b", "more": [1]}')
    assert [text for text, _ in open_rows(path)] == ["a", "b"]


@pytest.mark.parametrize(
    ("name", "content", "word"),
    [
        ("rows.csv", b"", "no column 'text'"),
        ("rows.csv", b"words\nhello\n", "no column 'text' (it has words)"),
        ("rows.csv", b"id,text\n1,a\n2\n", "row 1 has no text"),
        ("rows.csv", b'text\nfine\n"begun', "row 1"),
        ("rows.csv", b"text\nfine\n\xff\n", "row 1"),
        ("rows.csv", b"text,text_pair\na,b\nc\n", "row 1 has no text"),
        ("rows.jsonl", b'{"text": "a"}\n{"text": 5}\n', "row 1"),
        ("rows.jsonl", b'{"text": "a"}\n{"words": "b"}\n', "row 1"),
        ("rows.jsonl", b'{"text": "a"}\n[1]\n', "row 1"),
        ("rows.jsonl", b'{"text": "a"}\n{"text": "b', "row 1"),
        ("rows.jsonl", b'{"text": "\xff"}\n', "row 0"),
        ("rows.jsonl", b'{"text": "\\ud800"}\n', "row 0"),
        ("rows.jsonl", b'{"text": "a", "text_pair": "b"}\n{"text": "c"}\n', "no text_pair"),
        ("rows.jsonl", b'{"text": "a"}\n{"text": "b", "text_pair": "c"}\n', "a text_pair"),
        ("rows.parquet", b"PAR1, or not", "rows.parquet"),
        ("rows.txt", b"hello", "not a .parquet"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(tmp_path: Path, name: str, content: bytes, word: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=".+") as caught:
        list(open_rows(path))
    assert word in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    for name in ("none.csv", "none.jsonl", "none.parquet"):
        with pytest.raises(DataError, match="none"):
            open_rows(tmp_path / name)


@pytest.mark.parametrize(
    "content",
    [
        lambda size: b'text\n"' + b"lots of words\n" * (size // 10),  # a quote that never closes
        lambda size: b"text\n" + b"x" * (size + 1),
    ],
)
def test_a_row_that_would_not_fit_into_memory_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: Callable[[int], bytes]
) -> None:
    monkeypatch.setattr(module, "MAX_ROW_BYTES", 10_000)
    path = tmp_path / "rows.csv"
    path.write_bytes(content(10_000))
    with pytest.raises(DataError, match="10000"):
        list(open_rows(path))


def test_lines_of_stdin() -> None:
    assert list(lines_of(io.BytesIO("ä\r\n\nb".encode()))) == [("ä", None), ("", None), ("b", None)]
    with pytest.raises(DataError, match="line 1"):
        list(lines_of(io.BytesIO(b"fine\n\xff\n")))
