"""`budgetformer models`: list, show, verify and add checkpoints of a model store."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.progress import DownloadColumn, Progress, TransferSpeedColumn
from rich.table import Table

from budgetformer.checkpoint.store import Checkpoint, read_store
from budgetformer.errors import CheckpointError
from service.cli.terminal import (
    JsonOption,
    StoreOption,
    complete_model,
    err,
    note,
    out,
    print_errors,
    resolve,
)

models_app = typer.Typer(no_args_is_help=True, help="Manage the checkpoints of a model store.")


@models_app.command("list")
def list_models(
    model_store: StoreOption = Path("model_store"), as_json: JsonOption = False
) -> None:
    """List the checkpoints of a store."""
    store = read_store(model_store)
    if as_json:
        out.print_json(
            data={
                name: [c.version for c in versions] for name, versions in store.checkpoints.items()
            }
        )
    else:
        table = Table("model", "version", "labels", "layers x heads", "quality levels")
        for versions in store.checkpoints.values():
            for c in versions:
                levels = ", ".join(c.manifest.named_levels)
                sizes = f"{c.num_layers} x {c.num_heads}"
                table.add_row(c.name, str(c.version), str(len(c.manifest.labels)), sizes, levels)
        out.print(table)
    print_errors(store.errors)


ModelArgument = Annotated[
    str,
    typer.Argument(help="Model name, or a checkpoint folder.", autocompletion=complete_model),
]


@models_app.command("show")
def show_model(model: ModelArgument, model_store: StoreOption = Path("model_store")) -> None:
    """Print the manifest of a checkpoint as JSON."""
    out.print_json(resolve(model, model_store).manifest.model_dump_json())


@models_app.command("verify")
def verify_models(
    model: Annotated[
        str | None,
        typer.Argument(
            help="Model name or checkpoint folder. Default: all.", autocompletion=complete_model
        ),
    ] = None,
    as_json: JsonOption = False,
    model_store: StoreOption = Path("model_store"),
) -> None:
    """Check the files of a checkpoint, or of all checkpoints, against the manifest."""
    store = read_store(model_store) if model is None else None
    checkpoints = (
        [c for versions in store.checkpoints.values() for c in versions]
        if store
        else [resolve(model, model_store)]
    )
    problems = list(store.errors) if store else []
    sound = []
    for checkpoint in checkpoints:
        try:
            checkpoint.verify()
        except CheckpointError as error:
            problems.append(str(error))
        else:
            sound.append(checkpoint.label)
            if not as_json:
                files = len(checkpoint.manifest.files)
                out.print(f"{checkpoint.label}: {files} files match the manifest", soft_wrap=True)
    if as_json:
        out.print_json(data={"sound": sound, "problems": problems})
    print_errors(problems)


@models_app.command("add")
def add_model(
    source: Annotated[
        str,
        typer.Argument(
            help="Checkpoint: a folder, a tar or zip file, or a URL of one. Or a classifier to "
            "serve without conversion: a folder written by `save_pretrained`, or a model id of the "
            "Hugging Face hub."
        ),
    ],
    name: Annotated[
        str | None,
        typer.Option(help="Name of the model, for a classifier. Default: the name of its folder."),
    ] = None,
    version: Annotated[
        int | None, typer.Option(min=1, help="Version number to use. Default: the next one.")
    ] = None,
    texts: Annotated[
        Path | None,
        typer.Option(
            help="Texts like the classifier's inputs (CSV, JSONL, Parquet), to calibrate int8."
        ),
    ] = None,
    as_json: JsonOption = False,
    model_store: StoreOption = Path("model_store"),
) -> None:
    """Add a checkpoint or a classifier to a store, completely and verified, or not at all."""
    from budgetformer.adoption.adding import add_classifier, find_classifier
    from budgetformer.checkpoint.install import install

    folder = find_classifier(source)
    if folder is not None:
        _show_added(add_classifier(folder, model_store, note, name, version, texts), as_json)
        return
    if name is not None or texts is not None:
        raise typer.BadParameter("--name and --texts are for classifiers; this is a checkpoint")
    columns = (*Progress.get_default_columns()[:2], DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bar:
        task = bar.add_task("fetching", total=None)
        added = install(
            source,
            model_store,
            version,
            lambda done, total: bar.update(task, completed=done, total=total),
        )
    _show_added(added, as_json)


def _show_added(added: Checkpoint, as_json: bool) -> None:
    if as_json:
        out.print_json(data={"name": added.name, "version": added.version, "path": str(added.path)})
    else:
        out.print(f"{added.label} was added in {added.path}", soft_wrap=True)
