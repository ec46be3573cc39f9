"""`budgetformer jobs`: have a server classify files in the background."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
from rich.table import Table

from budgetformer.errors import BudgetFormerError
from service.cli.terminal import FAILED, JsonOption, err, out, print_error

if TYPE_CHECKING:
    from budgetformer.client import Client
    from budgetformer.client.jobs import TellJob

jobs_app = typer.Typer(no_args_is_help=True, help="Have a server classify files in the background.")

Address = Annotated[str, typer.Option(help="URL of the server.")]
HERE = "http://127.0.0.1:8000"
KeyOption = Annotated[str | None, typer.Option(help="API key, if the server requires one.")]
JobArgument = Annotated[str, typer.Argument(help="Id of the job.")]
Output = Annotated[Path | None, typer.Option(help="File to write the result to.")]


@jobs_app.command("submit")
def submit(
    file: Annotated[
        str,
        typer.Argument(help="CSV, JSONL or Parquet file with a column `text`, or the URL of one."),
    ],
    model: Annotated[str | None, typer.Option(help="Model. Default: the server's.")] = None,
    quality: Annotated[
        str | None,
        typer.Option(help="fast, balanced, best, or an accuracy drop (percentage points)."),
    ] = None,
    heads: Annotated[
        int | None, typer.Option(help="Heads per layer, instead of the decision of f_o.")
    ] = None,
    format: Annotated[
        str | None, typer.Option(help="File type of the result: csv, jsonl or parquet.")
    ] = None,
    follow: Annotated[bool, typer.Option("--follow", help="Wait until the job has ended.")] = False,
    output: Output = None,
    as_json: JsonOption = False,
    address: Address = HERE,
    key: KeyOption = None,
) -> None:
    """Send a file, or the URL of one, and print the job's id; --output waits for its result."""
    options: Any = {"model": model, "quality": quality, "heads": heads, "format": format}
    with _client(address, key) as client:
        job = client.submit_job(file, **options)
        if follow or output is not None:
            err.print(f"job {job['id']}", style="dim")
            job = _to_the_end(client, job["id"], output)
    if as_json:
        out.print_json(data=job)
    else:
        typer.echo(job["id"])
    _complain(job)


@jobs_app.command("list")
def list_jobs(as_json: JsonOption = False, address: Address = HERE, key: KeyOption = None) -> None:
    """List jobs, newest first."""
    with _client(address, key) as client:
        jobs = client.jobs()
    if as_json:
        out.print_json(data=jobs)
        return
    table = Table("job", "status", "model", "quality", "rows", "read", "submitted")
    for job in jobs:
        table.add_row(
            job["id"],
            job["status"],
            job["model"],
            str(job["quality"] or ""),
            f"{job['rows']:,}",
            f"{job['read_share']:.0%}",
            time.strftime("%Y-%m-%d %H:%M", time.localtime(job["created"])),
        )
    out.print(table)


@jobs_app.command("show")
def show(job: JobArgument, address: Address = HERE, key: KeyOption = None) -> None:
    """Print the progress of a job as JSON."""
    with _client(address, key) as client:
        out.print_json(data=client.job(job))


@jobs_app.command("follow")
def follow(
    job: JobArgument, output: Output = None, address: Address = HERE, key: KeyOption = None
) -> None:
    """Show the progress of a job until it has ended; --output then saves its result."""
    with _client(address, key) as client:
        _complain(_to_the_end(client, job, output))


@jobs_app.command("result")
def result(
    job: JobArgument,
    output: Annotated[Path, typer.Option(help="File to write the result to.")],
    address: Address = HERE,
    key: KeyOption = None,
) -> None:
    """Save the result of a finished job."""
    with _client(address, key) as client:
        _save(client, job, output)


@jobs_app.command("cancel")
def cancel(job: JobArgument, address: Address = HERE, key: KeyOption = None) -> None:
    """Remove a job with all its files; cancel it if it has not ended."""
    with _client(address, key) as client:
        client.cancel_job(job)


def _client(address: str, key: str | None) -> Client:
    try:
        from budgetformer.client import Client
    except ImportError as error:
        raise BudgetFormerError(str(error)) from error
    return Client(address, api_key=key)


def _to_the_end(client: Client, job: str, output: Path | None) -> dict[str, Any]:
    with _progress() as show_progress:
        ended = client.follow_job(job, show_progress)
    if output is not None and ended["status"] == "finished":
        _save(client, job, output)
    return ended


def _save(client: Client, job: str, output: Path) -> None:
    try:
        client.save_job_result(job, output)
    except OSError as error:
        raise BudgetFormerError(f"{output}: {error.strerror or error}") from error


def _complain(job: dict[str, Any]) -> None:
    if job["status"] == "failed":
        print_error(f"budgetformer: the job failed: {job['error']}")
        raise typer.Exit(FAILED)


@contextmanager
def _progress() -> Iterator[TellJob]:
    """Show the progress of a job on a terminal."""
    columns = (
        TextColumn("{task.fields[status]}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[rows]:,} rows"),
        TextColumn("{task.fields[speed]:,.0f}/s"),
        TextColumn("{task.fields[left]}", markup=False),
    )
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bar:
        task = bar.add_task("", total=1.0, status="queued", rows=0, speed=0.0, left="")

        def show_progress(job: dict[str, Any]) -> None:
            seconds = job["seconds_left"]
            left = job["waiting_for"] or ("" if seconds is None else f"{seconds:,.0f} s left")
            bar.update(
                task,
                completed=job["read_share"],
                status=job["status"],
                rows=job["rows"],
                speed=job["rows_per_second"],
                left=left,
            )

        yield show_progress
