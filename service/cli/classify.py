"""`budgetformer classify`."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Protocol

import typer
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from budgetformer.bulk import (
    Answered,
    Asked,
    Journal,
    Totals,
    check_output,
    classify_rows,
    finish,
)
from budgetformer.cores import usable_cores
from budgetformer.errors import PolicyError
from budgetformer.inference.policy import QUALITY_NAMES
from budgetformer.tables import Row, TableFile, lines_of, open_table
from service.cli.terminal import (
    JsonOption,
    ModelOption,
    StoreOption,
    err,
    out,
    print_error,
    resolve,
)


def classify(
    texts: Annotated[
        list[str] | None, typer.Argument(help="Texts. Default: stdin, one per line.")
    ] = None,
    model: ModelOption = None,
    file: Annotated[
        Path | None, typer.Option(help="CSV, JSONL or Parquet with a column `text`.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(help="CSV, JSONL or Parquet file to write. Default: print the answers."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Resume an interrupted run with the same --output.")
    ] = False,
    quality: Annotated[
        str, typer.Option(help="fast, balanced, best, or an accuracy drop (percentage points).")
    ] = "balanced",
    heads: Annotated[
        int | None, typer.Option(help="Heads per layer, instead of the decision of f_o.")
    ] = None,
    workers: Annotated[
        int, typer.Option(min=0, help="Processes for many rows. 0: one per usable core.")
    ] = 0,
    as_json: JsonOption = False,
    model_store: StoreOption = Path("model_store"),
) -> None:
    """Classify texts on this machine, without a server; any number of rows, in bounded memory."""
    if texts and file is not None:
        raise typer.BadParameter("give texts or a --file, not both")
    if resume and output is None:
        raise typer.BadParameter("--resume requires the --output of the interrupted run")
    rows = open_table(file) if file is not None else _rows(texts)
    checkpoint = resolve(model, model_store)
    level = _level(quality) if checkpoint.calibrated else None
    checkpoint.rule(level, heads)
    asked = Asked(str(checkpoint.path), level, heads)
    count = workers or usable_cores()
    if output is None:
        with _progress(rows) as track:
            for answered in track(classify_rows(asked, rows, count)):
                _show(answered, as_json)
        return
    check_output(output)
    if resume and Journal.is_finished(output):
        print_error(f"{output}: is complete already, nothing is left to do")
        return
    began = time.monotonic()
    with Journal(output, checkpoint, level, heads, resume) as journal, _progress(rows) as track:
        resumed = journal.rows
        asked = Asked(asked.path, level, heads, journal.precision)
        for answered in track(classify_rows(asked, journal.remaining(iter(rows)), count), resumed):
            journal.append(answered)
        finish(journal, output)
    _summarize(output, resumed, journal.totals, time.monotonic() - began, as_json)


def _rows(texts: list[str] | None) -> Iterator[Row]:
    if not texts:
        return lines_of(sys.stdin.buffer)
    for text in texts:
        if not text.isprintable() and any("\ud800" <= c <= "\udfff" for c in text):
            raise typer.BadParameter("a text is not UTF-8")
    return ((text, None) for text in texts)


def _level(quality: str) -> str | float:
    if quality in QUALITY_NAMES:
        return quality
    try:
        return float(quality)
    except ValueError:
        raise PolicyError(f"quality {quality!r} is neither a level nor a number") from None


class _Track(Protocol):
    def __call__(self, answers: Iterator[Answered], done: int = 0) -> Iterator[Answered]: ...


@contextmanager
def _progress(rows: Iterable[Row]) -> Iterator[_Track]:
    """Show progress on a terminal: the share of the file that was read, and answered rows.

    Yields:
        A function that passes answers on and counts them; `done` rows were answered before.
    """
    columns = (
        TextColumn("classifying"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[done]:,} rows"),
        TextColumn("{task.fields[speed]:,.0f}/s"),
        TimeRemainingColumn(),
    )
    file = rows if isinstance(rows, TableFile) else None
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bar:
        task = bar.add_task("", total=None if file is None else file.size, done=0, speed=0.0)

        def track(answers: Iterator[Answered], done: int = 0) -> Iterator[Answered]:
            resumed, began = done, time.monotonic()
            for answered in answers:
                yield answered
                done += answered.rows
                speed = (done - resumed) / (time.monotonic() - began)
                bar.update(task, completed=file.position if file else done, done=done, speed=speed)

        yield track


def _show(answered: Answered, as_json: bool) -> None:
    if as_json or not out.is_terminal:
        typer.echo(answered.lines, nl=False)
        return
    table = Table("label", "score", "steps", "heads", "of dense", "text")
    for row in map(json.loads, answered.lines.splitlines()):
        table.add_row(
            row["label"],
            f"{row['score']:.3f}",
            ", ".join(map(str, row["steps"])),
            str(row["heads"]),
            f"{row['macs'] / row['dense_macs']:.1%}",
            Text(row["text"][:80]),
        )
    out.print(table)


def _summarize(output: Path, resumed: int, totals: Totals, seconds: float, as_json: bool) -> None:
    figures = {
        "output": str(output),
        "rows": totals.rows,
        "rows_resumed": resumed,
        "seconds": round(seconds, 3),
        "rows_per_second": round((totals.rows - resumed) / seconds, 1),
        "mean_heads": totals.mean_heads,
        "macs_share": totals.macs_share,
        "labels": dict(totals.labels.most_common()),
    }
    if as_json:
        out.print_json(data=figures)
        return
    table = Table("", "", show_header=False)
    table.add_row("written to", Text(str(output)))
    table.add_row("rows", f"{figures['rows']:,}, of them {resumed:,} by an earlier run")
    table.add_row("rows per second", f"{figures['rows_per_second']:,.0f} (in {seconds:,.1f} s)")
    table.add_row("mean heads", f"{figures['mean_heads']:.1f}")
    table.add_row("multiply-adds", f"{figures['macs_share']:.1%} of the dense network's")
    for label, count in totals.labels.most_common(10):
        table.add_row(Text(label), f"{count:,} ({count / totals.rows:.1%})")
    out.print(table)
