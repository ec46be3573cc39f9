"""Tables of strings, written in every supported format."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet

KINDS = ("csv", "jsonl", "parquet")
TEXT_KINDS = ("csv", "jsonl")
ENDS = ("\n", "\r\n", "\r")
Records = list[dict[str, Any]]


def csv_text(records: Records, end: str) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, list(records[0]), lineterminator=end, quoting=csv.QUOTE_ALL)
    writer.writeheader()
    writer.writerows(records)
    return out.getvalue()


def write(path: Path, records: Records, *, end: str = "\n", bom: bool = False) -> Path:
    """Write records of strings in the format of the suffix of the path."""
    if path.suffix == ".parquet":
        parquet.write_table(pa.Table.from_pylist(records), path, row_group_size=3)
        return path
    lines = "".join(json.dumps(record, ensure_ascii=False) + end for record in records)
    text = csv_text(records, end) if path.suffix == ".csv" else lines
    path.write_bytes((("\ufeff" if bom else "") + text).encode())
    return path


def of_texts(texts: list[str], paired: bool = False) -> Records:
    pairs = [{"text_pair": text[::-1]} if paired else {} for text in texts]
    return [
        {"id": str(i), "text": text} | pair
        for i, (text, pair) in enumerate(zip(texts, pairs, strict=True))
    ]
