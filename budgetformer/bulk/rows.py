"""Rows of text from CSV, JSONL and Parquet files, read as they are needed."""

from __future__ import annotations

import codecs
import csv
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from budgetformer.errors import DataError

Row = tuple[str, str | None]
"""A text, and its pair if the rows are pairs."""

MAX_ROW_BYTES = 16 * 2**20
PARQUET_ROWS = 4096
READ_BYTES = 2**20


class _Line(msgspec.Struct):
    text: str
    text_pair: str | None = None


class RowFile(ABC):
    """A file of rows: iterate over it once, for `(text, text_pair)` each.

    `position` of `size` says how much has been read, in units of the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = 0

    @property
    @abstractmethod
    def position(self) -> int:
        """How much of `size` has been read."""

    @abstractmethod
    def _read(self) -> Iterator[tuple[Any, Any]]:
        """Yield text and pair of each row, unchecked."""

    def __iter__(self) -> Iterator[Row]:
        """Yield the rows.

        Raises:
            DataError: the file cannot be read, or a row has no text, or no pair though others do.
        """
        with_pair: bool | None = None
        row = 0
        try:
            for text, pair in self._read():
                if not isinstance(text, str):
                    raise DataError(f"{self.path}: row {row} has no text")
                with_pair = pair is not None if with_pair is None else with_pair
                if with_pair != isinstance(pair, str):
                    has = "no text_pair" if with_pair else "a text_pair, others have none"
                    raise DataError(f"{self.path}: row {row} has {has}")
                yield text, pair
                row += 1
        except (OSError, ValueError, csv.Error) as error:
            raise DataError(f"{self.path}: row {row}: {error}") from error


class _ByteFile(RowFile):
    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._file: BinaryIO | None = None
        try:
            self.size = path.stat().st_size
        except OSError as error:
            raise DataError(f"{path}: {error.strerror or error}") from error

    @property
    def position(self) -> int:
        if self._file is None:
            return 0
        return self.size if self._file.closed else self._file.tell()

    def _lines(self) -> Iterator[bytes]:
        """Yield lines; one that would not fit into memory is refused instead of read."""
        with self.path.open("rb", buffering=READ_BYTES) as self._file:
            while line := self._file.readline(MAX_ROW_BYTES + 1):
                if len(line) > MAX_ROW_BYTES:
                    raise ValueError(f"longer than {MAX_ROW_BYTES} bytes")
                yield line


class _JsonLines(_ByteFile):
    def _read(self) -> Iterator[tuple[Any, Any]]:
        decode = msgspec.json.Decoder(_Line).decode
        for line in self._lines():
            if line.strip():
                found = decode(line)
                yield found.text, found.text_pair


class _Csv(_ByteFile):
    def _read(self) -> Iterator[tuple[Any, Any]]:
        csv.field_size_limit(MAX_ROW_BYTES)
        lines = self._lines()
        first = next(lines, b"").removeprefix(codecs.BOM_UTF8)  # spreadsheets write it
        rows = csv.reader(map(bytes.decode, chain([first], lines)), strict=True)
        header = next(rows, [])
        if "text" not in header:
            raise DataError(f"{self.path}: no column 'text' (it has {', '.join(header)})")
        text = header.index("text")
        pair = header.index("text_pair") if "text_pair" in header else None
        for row in rows:
            if row:
                short = len(row) <= max(text, pair or 0)
                yield None if short else row[text], None if short or pair is None else row[pair]


class _Parquet(RowFile):
    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._row = 0
        try:
            import pyarrow as pa
            import pyarrow.parquet
        except ImportError as error:
            raise DataError(
                f"{path}: Parquet needs pyarrow (pip install 'budgetformer-serving[parquet]')"
            ) from error
        try:
            with pyarrow.parquet.ParquetFile(path) as file:
                names = file.schema_arrow.names
                self.size = file.metadata.num_rows
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"{path}: {error}") from error
        if "text" not in names:
            raise DataError(f"{path}: no column 'text' (it has {', '.join(names)})")
        self._columns = [name for name in ("text", "text_pair") if name in names]

    @property
    def position(self) -> int:
        return self._row

    def _read(self) -> Iterator[tuple[Any, Any]]:
        import pyarrow.parquet

        with pyarrow.parquet.ParquetFile(self.path, buffer_size=READ_BYTES) as file:
            for batch in file.iter_batches(PARQUET_ROWS, columns=self._columns):
                texts, *pairs = (batch.column(name).to_pylist() for name in self._columns)
                self._row += len(texts)
                yield from zip(texts, pairs[0] if pairs else [None] * len(texts), strict=True)


_KINDS: dict[str, type[RowFile]] = {
    ".csv": _Csv,
    ".jsonl": _JsonLines,
    ".ndjson": _JsonLines,
    ".parquet": _Parquet,
}


def open_rows(path: Path) -> RowFile:
    """Open a .csv, .jsonl or .parquet file with a column `text` and perhaps `text_pair`.

    Raises:
        DataError: it is missing, broken or of another kind.
    """
    kind = _KINDS.get(path.suffix.lower())
    if kind is None:
        raise DataError(f"{path}: not a .parquet, .csv or .jsonl file")
    return kind(path)


def lines_of(file: Iterable[bytes]) -> Iterator[Row]:
    """Yield each line of standard input as a row.

    Raises:
        DataError: a line is not UTF-8.
    """
    for number, line in enumerate(file):
        try:
            yield line.decode().rstrip("\r\n"), None
        except ValueError as error:
            raise DataError(f"stdin: line {number}: {error}") from error
