"""Write the answers of a finished run as JSONL, CSV or Parquet, completely or not at all."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

from budgetformer.bulk.journal import Journal
from budgetformer.errors import DataError

COLUMNS = (
    "text", "text_pair", "label", "score", "probs", "budget", "predicted", "steps", "heads", "macs",
    "dense_macs", "tokens", "truncated", "error",
)  # fmt: skip
_OPTIONAL = {"text_pair", "error"}
ROW_GROUP = 65_536


def _jsonl(journal: Journal, path: Path) -> None:
    with path.open("wb") as file:
        file.writelines(journal.lines())


def _csv(journal: Journal, path: Path) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        answers = journal.answers()
        first = list(islice(answers, 1))
        columns = _columns(first)
        table = csv.DictWriter(file, columns)
        table.writeheader()
        for rows in (first, answers):
            table.writerows(
                row | {name: json.dumps(row[name]) for name in ("probs", "steps") if name in row}
                for row in rows
            )


def _parquet(journal: Journal, path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet

    answers = journal.answers()
    group = list(islice(answers, ROW_GROUP))
    kinds: dict[str, Any] = dict.fromkeys(COLUMNS, pa.int64())
    kinds |= dict.fromkeys(("text", "text_pair", "label", "error"), pa.string())
    kinds |= {"score": pa.float64(), "probs": pa.list_(pa.float64()), "truncated": pa.bool_()}
    kinds |= {"steps": pa.list_(pa.int64())}
    schema = pa.schema([(name, kinds[name]) for name in _columns(group)])
    with pyarrow.parquet.ParquetWriter(path, schema) as file:
        while group:
            file.write_table(pa.Table.from_pylist(group, schema))
            group = list(islice(answers, ROW_GROUP))


def _columns(first: list[dict[str, Any]]) -> list[str]:
    present = set(first[0]) if first else set()
    return [name for name in COLUMNS if name in present or name not in _OPTIONAL]


_WRITERS: dict[str, Callable[[Journal, Path], None]] = {
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".csv": _csv,
    ".parquet": _parquet,
}


def check_output(output: Path) -> None:
    """Check that `output` can be written, before anything is computed.

    Raises:
        DataError: the folder is missing, the extension is unknown, or a package is missing.
    """
    if output.suffix.lower() not in _WRITERS:
        raise DataError(f"{output}: not a .parquet, .csv or .jsonl file")
    if not output.parent.is_dir():
        raise DataError(f"{output.parent}: no such folder")
    if output.suffix.lower() == ".parquet":
        try:
            import pyarrow.parquet  # noqa: F401
        except ImportError as error:
            raise DataError(
                f"{output}: Parquet needs pyarrow (pip install 'budgetformer-serving[parquet]')"
            ) from error


def finish(journal: Journal, output: Path) -> None:
    """Write all answers of a journal to `output`, completely or not at all; delete the journal.

    Raises:
        DataError: the output cannot be written.
    """
    whole = output.with_name(f"{output.name}.whole")
    try:
        _WRITERS[output.suffix.lower()](journal, whole)
        whole.replace(output)
    except OSError as error:
        raise DataError(f"{output}: {error.strerror or error}") from error
    journal.remove()
