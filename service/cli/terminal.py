"""Consoles, common options and helper functions of all commands."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from budgetformer.checkpoint.store import Checkpoint, read_checkpoint, read_store
from budgetformer.errors import BudgetFormerError

out = Console()
err = Console(stderr=True)

FAILED, USAGE = 1, 2
"""Exit codes of a failed command, and of invalid usage or settings."""


def print_error(problem: str) -> None:
    """Print an error on one line of any length."""
    err.print(problem, style="red", markup=False, highlight=False, soft_wrap=True)


def note(event: str) -> None:
    """Print a line about progress; it may quote a file, so it is not interpreted as markup."""
    err.print(event, markup=False, highlight=False, soft_wrap=True)


def print_errors(problems: list[str]) -> None:
    """Print errors and, if there are any, exit with the code of a failure."""
    for problem in problems:
        print_error(problem)
    if problems:
        raise typer.Exit(FAILED)


def complete_model(context: typer.Context, incomplete: str) -> list[str]:
    """Return the models of the store that begin with `incomplete`, for the shell."""
    try:
        store = read_store(context.params.get("model_store") or Path("model_store"))
    except BudgetFormerError:
        return []
    names = [*store.checkpoints]
    names += [c.label for versions in store.checkpoints.values() for c in versions]
    return [name for name in sorted(names) if name.startswith(incomplete)]


StoreOption = Annotated[Path, typer.Option("--model-store", help="Folder of checkpoints.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
ModelOption = Annotated[
    str | None,
    typer.Option(help="Model name, or a checkpoint folder.", autocompletion=complete_model),
]


def resolve(model: str | None, model_store: Path) -> Checkpoint:
    """Read a checkpoint, given as a folder, `name` or `name:version`.

    Args:
        model: the checkpoint; None: the first model of the store.
        model_store: folder of the store.

    Raises:
        CheckpointError: the checkpoint does not exist, or is damaged.
    """
    if model is not None and (Path(model) / "manifest.json").is_file():
        return read_checkpoint(Path(model))
    store = read_store(model_store)
    name, _, number = (model or next(iter(sorted(store.checkpoints)), "")).partition(":")
    if number:
        return read_checkpoint(model_store / name / number)
    return store.latest(name)
