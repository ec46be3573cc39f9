"""All commands read the same rows from a table, in every format."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from budgetformer.bulk import Answered, Journal, finish, open_rows
from budgetformer.checkpoint.store import Checkpoint, read_checkpoint
from budgetformer.errors import DataError
from budgetformer.tables import Row, open_table, read_texts
from budgetformer.training.data import read_examples
from budgetformer.training.evaluation import read_test
from tests.support.networks import PROPERTY
from tests.support.stores import TOPICS
from tests.support.tables import ENDS, KINDS, of_texts, write

ODD = ["0101", "True", "null", "NaN", "1.0", "\x00", "a\rb", "\u2028", "\x85", "\ufeff", '"', "'"]


@pytest.fixture(scope="module")
def topics(model_store: Path) -> Checkpoint:
    return read_checkpoint(model_store / TOPICS / "2")


ENTRIES: dict[str, Callable[[Path, Checkpoint], list[Row]]] = {
    "classify": lambda path, _: list(open_rows(path)),
    "bench": lambda path, _: rows_of(*read_texts(path)),
    "train": lambda path, _: (lambda e: rows_of(e.texts, e.pairs))(read_examples(path)),
    "evaluate": lambda path, made: (lambda e: rows_of(e.texts, e.pairs))(read_test(made, path)),
}
"""The function with which each command reads a file."""


def rows_of(texts: list[str], pairs: list[str] | None) -> list[Row]:
    return list(zip(texts, pairs or [None] * len(texts), strict=True))


any_text = st.one_of(
    st.sampled_from(ODD), st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
)


@PROPERTY
@given(
    texts=st.lists(any_text, min_size=2, max_size=8),
    paired=st.booleans(),
    bom=st.booleans(),
    end=st.sampled_from(ENDS),
)
def test_every_command_reads_the_same_rows(
    tmp_path_factory: pytest.TempPathFactory,
    topics: Checkpoint,
    texts: list[str],
    paired: bool,
    bom: bool,
    end: str,
) -> None:
    folder = tmp_path_factory.mktemp("same")
    names = itertools.cycle(topics.manifest.labels)
    records = [r | {"label": name} for r, name in zip(of_texts(texts, paired), names)]  # noqa: B905
    expected = [(r["text"], r.get("text_pair")) for r in records]
    for kind in KINDS:
        path = write(folder / f"rows.{kind}", records, end=end, bom=bom)
        for command, read in ENTRIES.items():
            assert read(path, topics) == expected, (kind, command)
        examples = read_examples(path)
        assert [examples.names[i] for i in examples.labels] == [r["label"] for r in records]


@PROPERTY
@given(
    valid_rows=st.integers(1, 5),
    fault=st.sampled_from(["short", "long", "null", "not UTF-8"]),
    end=st.sampled_from(ENDS),
)
def test_every_command_refuses_an_invalid_row_by_its_number(
    tmp_path_factory: pytest.TempPathFactory,
    topics: Checkpoint,
    valid_rows: int,
    fault: str,
    end: str,
) -> None:
    folder = tmp_path_factory.mktemp("bad")
    labels = topics.manifest.labels
    records = [{"text": f"text {i}", "label": labels[i % 2]} for i in range(valid_rows + 2)]
    for kind in KINDS:
        path = write(folder / f"rows.{kind}", records, end=end)
        marked = records[valid_rows]["text"].encode()
        content = path.read_bytes()
        if kind == "csv":
            broken = {
                "short": (b'"' + marked + b'",', b""),
                "long": (marked, marked + b'","'),
                "null": (b'"' + marked + b'",', b""),  # CSV has no null
                "not UTF-8": (marked, b"\xff"),
            }[fault]
        elif kind == "jsonl":
            broken = {
                "short": (b'"text": "' + marked + b'", ', b""),
                "long": (marked, marked + b'", "text": "'),
                "null": (b'"' + marked + b'"', b"null"),
                "not UTF-8": (marked, b"\xff"),
            }[fault]
        else:
            broken = (b"", b"")
        if broken == (b"", b""):
            texts = [None if i == valid_rows else r["text"] for i, r in enumerate(records)]
            table = pa.table({"text": texts, "label": [r["label"] for r in records]})
            parquet.write_table(table, path)
        else:
            path.write_bytes(content.replace(*broken))
        for command, read in ENTRIES.items():
            with pytest.raises(DataError, match=rf"rows\.{kind}, row {valid_rows + 1}\b") as caught:
                read(path, topics)
            assert "\n" not in str(caught.value), command


@PROPERTY
@given(texts=st.lists(any_text, min_size=1, max_size=5), paired=st.booleans())
def test_an_output_can_be_read_as_input(
    tmp_path_factory: pytest.TempPathFactory,
    topics: Checkpoint,
    texts: list[str],
    paired: bool,
) -> None:
    answer = {"label": "0101", "score": 1.0, "probs": [1.0], "steps": [1], "truncated": True}
    counts = ("budget", "predicted", "heads", "macs", "dense_macs", "tokens")
    answer |= dict.fromkeys(counts, 1)
    rows = [{k: v for k, v in r.items() if k != "id"} for r in of_texts(texts, paired)]
    lines = b"".join(json.dumps(row | answer).encode() + b"\n" for row in rows)
    for kind in KINDS:
        output = tmp_path_factory.mktemp("out") / f"answers.{kind}"
        with Journal(output, topics, "balanced", None, False) as journal:
            journal.append(Answered(lines, len(texts), {}, 0, 0, 0, "float32"))
            finish(journal, output)
        read = list(open_table(output).rows("label"))
        assert read == [(r["text"], r.get("text_pair"), "0101") for r in rows]
