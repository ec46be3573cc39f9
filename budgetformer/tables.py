"""Read tables of texts: CSV, JSONL and Parquet files, for every command, in bounded memory."""

from __future__ import annotations

import codecs
import csv
import json
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from budgetformer.errors import DataError, one_line

Row = tuple[str, str | None]
"""A text, and the second text of its pair, if any."""

MAX_ROW_BYTES = 16 * 2**20
PARQUET_ROWS = 4096
READ_BYTES = 2**20

TEXT, PAIR = "text", "text_pair"
_WIDE = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)
_JSON_SPACE = " \t\r\n"
_KINDS_OF_VALUES = {
    type(None): "null",
    bool: "a boolean",
    int: "an integer",
    float: "a floating-point number",
    str: "a string",
    bytes: "binary",
    list: "a list",
    dict: "an object",
}


def kind_of(value: object) -> str:
    """Return the type of a cell in words, such as "an integer"."""
    return _KINDS_OF_VALUES.get(type(value), f"a value of type {type(value).__name__}")


def check_string(value: object, column: str) -> str:
    """Check that a cell is a string, and return it.

    Raises:
        ValueError: the cell has another type, or is not valid Unicode.
    """
    if not isinstance(value, str):
        raise ValueError(f"column {column!r} holds {kind_of(value)}, not a string")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"column {column!r} holds half of a surrogate pair") from error
    return value


class TableFile(ABC):
    """A file of rows with a column `text` and perhaps `text_pair`.

    Error messages count rows from 1, without the header of a CSV file.

    Attributes:
        path: path of the file.
        size: size of the file, in bytes or rows.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = 0
        self._row = 0

    @property
    @abstractmethod
    def position(self) -> int:
        """The part of `size` that has been read."""

    def label_names(self) -> list[str] | None:
        """Return the class names in the metadata of the file, if any."""
        return None

    def __iter__(self) -> Iterator[Row]:
        """Yield text and pair of each row."""
        return self.rows()

    def rows(self, *others: str) -> Iterator[Any]:
        """Yield text, pair and the cells of the columns `others` of each row.

        Texts are strings; other cells have the types of the file (in CSV always strings). If the
        first row has a pair, all rows must have one, otherwise none.

        Raises:
            DataError: the file or one of its rows cannot be read.
        """
        paired: bool | None = None
        try:
            for text, pair, *cells in self._read((TEXT, PAIR, *others)):
                check_string(text, TEXT)
                if paired is None:
                    paired = pair is not None
                if paired:
                    check_string(pair, PAIR)
                elif pair is not None:
                    raise ValueError(f"column {PAIR!r} has a value, it was null in the first row")
                yield (text, pair, *cells)
        except (OSError, ValueError) as error:
            raise self.error(error) from error
        except csv.Error as error:
            raise self.error(f"not CSV: {error}") from error
        except RecursionError as error:
            raise self.error("nested too deeply") from error

    def error(self, problem: object) -> DataError:
        """Return an error whose message names the file and the row that was read last."""
        if isinstance(problem, OSError):
            problem = problem.strerror or problem
        return DataError(f"{self.path}, {self._where()}: {one_line(problem)}")

    @abstractmethod
    def _read(self, columns: Sequence[str]) -> Iterator[Sequence[Any]]:
        """Yield the cells of each row unchecked, None for null; set `_row` to the row's number."""

    def _where(self) -> str:
        return f"row {self._row}"

    def _check_columns(self, names: Sequence[str], required: Sequence[str]) -> None:
        """Check that no column is repeated, and none but `text_pair` is missing."""
        repeated = [name for name, count in Counter(names).items() if name and count > 1]
        if repeated:
            raise DataError(f"{self.path}: more than one column {repeated[0]!r}")
        for name in required:
            if name not in names and name != PAIR:
                raise DataError(f"{self.path}: {_missing(name, names)}")


def _missing(column: str, names: Iterable[str]) -> str:
    return f"no column {column!r} (it has {', '.join(map(repr, names)) or 'no columns'})"


class _Lines:
    """The lines of a UTF-8 file, which end in a line feed, a carriage return or both.

    Attributes:
        number, offset: number of lines that were yielded, and of their bytes.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.number = 0
        self.offset = 0

    def __iter__(self) -> Iterator[str]:
        """Yield the lines with their line ends, without a byte order mark.

        Raises:
            ValueError: a line is not UTF-8, or longer than `MAX_ROW_BYTES`.
        """
        for line in self._split():
            if self.offset == 0 and line.startswith(_WIDE):
                raise ValueError("UTF-16 or UTF-32: save it as UTF-8")
            try:
                text = line.decode()
            except UnicodeDecodeError as error:
                offset = self.offset + error.start
                raise ValueError(
                    f"byte 0x{line[error.start]:02x} at offset {offset} is not UTF-8"
                ) from error
            self.number += 1
            first = self.offset == 0
            self.offset += len(line)
            yield text.removeprefix("\ufeff") if first else text

    def _split(self) -> Iterator[bytes]:
        rest = b""
        while chunk := self._file.read1(READ_BYTES):  # type: ignore[attr-defined]
            *whole, rest = (rest + chunk).splitlines(keepends=True)
            for line in whole:
                yield _bounded(line)
            _bounded(rest)  # its line end, or the second half of it, may be in the next chunk
        if rest:
            yield rest


def _bounded(line: bytes) -> bytes:
    if len(line) > MAX_ROW_BYTES:
        raise ValueError(f"longer than {MAX_ROW_BYTES} bytes")
    return line


class _TextFile(TableFile):
    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._lines: _Lines | None = None
        self._line = 1  # first line of the row that is being read
        try:
            self.size = path.stat().st_size
        except OSError as error:
            raise DataError(f"{path}: {error.strerror or error}") from error

    @property
    def position(self) -> int:
        return 0 if self._lines is None else self._lines.offset

    def _where(self) -> str:
        return f"{f'row {self._row}' if self._row else 'header'} (line {self._line})"

    def _read(self, columns: Sequence[str]) -> Iterator[Sequence[Any]]:
        self._row, self._line = 0, 1
        with self.path.open("rb") as file:
            self._lines = _Lines(file)
            yield from self._parse(self._lines, columns)

    @abstractmethod
    def _parse(self, lines: _Lines, columns: Sequence[str]) -> Iterator[Sequence[Any]]:
        """Yield the cells of each row; set `_row` and `_line` to the row that is being read."""


class _JsonLines(_TextFile):
    def _parse(self, lines: _Lines, columns: Sequence[str]) -> Iterator[Sequence[Any]]:
        self._row = 1
        for line in lines:
            if line.strip(_JSON_SPACE):
                cells = _object(line)
                for name in columns:
                    if name not in cells and name != PAIR:
                        raise ValueError(_missing(name, cells))
                yield [cells.get(name) for name in columns]
                self._row += 1
            self._line = lines.number + 1


def _object(line: str) -> dict[str, Any]:
    try:
        value = json.loads(line, object_pairs_hook=_unique, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at character {error.pos + 1}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{kind_of(value)}, but each line must be a JSON object")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        (name, _), *_ = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"the key {name!r} occurs more than once")
    return values


def _no_constant(name: str) -> None:
    raise ValueError(f"not JSON: {name}")


class _Csv(_TextFile):
    def _parse(self, lines: _Lines, columns: Sequence[str]) -> Iterator[Sequence[Any]]:
        csv.field_size_limit(MAX_ROW_BYTES)
        header: list[str] | None = None
        indices: list[int | None] = []
        for cells in csv.reader(lines, strict=True):
            if header is None and cells:
                header = cells
                self._check_columns(header, columns)
                indices = [header.index(name) if name in header else None for name in columns]
                self._row = 1
            elif header is not None and cells:
                if len(cells) != len(header):
                    fields = f"{len(cells)} field{'s' * (len(cells) != 1)}"
                    raise ValueError(f"{fields}, the header has {len(header)}")
                yield [None if index is None else cells[index] for index in indices]
                self._row += 1
            self._line = lines.number + 1
        if header is None:
            raise DataError(f"{self.path}: empty, not even a header")


class _Parquet(TableFile):
    def __init__(self, path: Path) -> None:
        super().__init__(path)
        try:
            import pyarrow as pa
            import pyarrow.parquet
        except ImportError as error:
            raise DataError(
                f"{path}: Parquet needs pyarrow (pip install 'budgetformer-serving[parquet]')"
            ) from error
        try:
            with pyarrow.parquet.ParquetFile(path) as file:
                self._schema = file.schema_arrow
                self.size = file.metadata.num_rows
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"{path}: {one_line(error)}") from error

    @property
    def position(self) -> int:
        return min(max(self._row - 1, 0), self.size)

    def label_names(self) -> list[str] | None:
        """Return the class names that the library `datasets` stores in the schema, if any."""
        try:
            stored = json.loads((self._schema.metadata or {})[b"huggingface"])
            names = stored["info"]["features"]["label"]["names"]
        except (KeyError, TypeError, ValueError):
            return None
        return names if isinstance(names, list) else None

    def _read(self, columns: Sequence[str]) -> Iterator[Sequence[Any]]:
        import pyarrow as pa
        import pyarrow.parquet

        self._check_columns(self._schema.names, columns)
        present = [name for name in columns if name in self._schema.names]
        for name in {TEXT, PAIR}.intersection(present):
            self._check_type(name)
        self._row = 1
        try:
            with pyarrow.parquet.ParquetFile(self.path, buffer_size=READ_BYTES) as file:
                for batch in file.iter_batches(PARQUET_ROWS, columns=present):
                    cells = dict(zip(batch.schema.names, map(_values, batch.columns), strict=True))
                    nulls = [None] * batch.num_rows
                    for row in zip(*(cells.get(name, nulls) for name in columns), strict=True):
                        yield row
                        self._row += 1
        except pa.ArrowException as error:
            raise self.error(error) from error

    def _check_type(self, name: str) -> None:
        from pyarrow import types

        kind = self._schema.field(name).type
        if types.is_dictionary(kind):
            kind = kind.value_type
        strings = (types.is_string, types.is_large_string, types.is_string_view)
        if not any(matches(kind) for matches in strings) and not (
            name == PAIR and types.is_null(kind)
        ):
            raise DataError(f"{self.path}: column {name!r} has type {kind}, not string")


def _values(column: Any) -> Iterable[Any]:
    """Return the cells of a column; a cell that is not UTF-8 fails when its row is reached."""
    try:
        cells: list[Any] = column.to_pylist()
    except UnicodeDecodeError:
        return (cell.as_py() for cell in column)
    return cells


_FORMATS: dict[str, type[TableFile]] = {
    ".parquet": _Parquet,
    ".csv": _Csv,
    ".jsonl": _JsonLines,
    ".ndjson": _JsonLines,
}


def open_table(path: Path) -> TableFile:
    """Open a .csv, .jsonl or .parquet file.

    Raises:
        DataError: the file is missing, damaged or of another type.
    """
    if path.is_dir():
        raise DataError(f"{path}: a folder; name a .parquet, .csv or .jsonl file in it")
    kind = _FORMATS.get(path.suffix.lower())
    if kind is None:
        raise DataError(f"{path}: not a .parquet, .csv or .jsonl file")
    return kind(path)


def find_table(folder: Path, stem: str) -> Path | None:
    """Return the table with a name in a folder, such as `train.csv` for `train`, if there is one.

    Raises:
        DataError: the folder has several tables with this name.
    """
    tables = [
        path
        for path in sorted(folder.glob(f"{stem}.*"))
        if path.stem == stem and path.suffix.lower() in _FORMATS
    ]
    if len(tables) > 1:
        raise DataError(f"{folder}: both {tables[0].name} and {tables[1].name}; keep one of them")
    return tables[0] if tables else None


def read_texts(path: Path) -> tuple[list[str], list[str] | None]:
    """Read the columns `text` and, if there is one, `text_pair`.

    Raises:
        DataError: the file cannot be read, or a row has no text.
    """
    rows = list(open_table(path))
    pairs = [pair for _, pair in rows if pair is not None]
    return [text for text, _ in rows], pairs or None


def lines_of(file: BinaryIO) -> Iterator[Row]:
    """Yield each line of standard input as a row.

    Raises:
        DataError: a line is not UTF-8, or too long.
    """
    lines = _Lines(file)
    try:
        for line in lines:
            yield line.removesuffix("\n").removesuffix("\r"), None
    except ValueError as error:
        raise DataError(f"stdin, line {lines.number + 1}: {error}") from error
