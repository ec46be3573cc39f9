"""The command line: `budgetformer`."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from pydantic import ValidationError
from pydantic_settings import CliSettingsSource
from pydantic_settings import SettingsError as SourceError
from rich.console import Console
from rich.markdown import Markdown
from rich.progress import Progress
from rich.table import Table

import budgetformer
from budgetformer.checkpoint import Checkpoint, read_checkpoint, read_store
from budgetformer.cost_table import read_tables
from budgetformer.errors import BudgetFormerError, CheckpointError
from budgetformer.policy import QUALITY_NAMES
from budgetformer.precision import Precision
from service.access import check_keys, key_line, new_key
from service.observability.logs import configure_logs
from service.settings import (
    CONFIG_FILE,
    PREFIX,
    Settings,
    SettingsError,
    refuse_unknown_environment,
)

if TYPE_CHECKING:
    from budgetformer.training.data import Examples

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, add_completion=True)
models_app = typer.Typer(no_args_is_help=True, help="Look at the checkpoints of a model store.")
app.add_typer(models_app, name="models")
bench_app = typer.Typer(no_args_is_help=True, help="Time this machine.")
app.add_typer(bench_app, name="bench")
keys_app = typer.Typer(no_args_is_help=True, help="Make keys for callers of a server.")
app.add_typer(keys_app, name="keys")

out = Console()
err = Console(stderr=True)

CLASSIFY_BATCH = 512

StoreOption = Annotated[Path, typer.Option("--model-store", help="Folder of checkpoints.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.callback()
def _root() -> None:
    """Serve, train and use text classifiers that spend only the heads that a text needs."""


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    add_help_option=False,
)
def serve(context: typer.Context) -> None:
    """Serve the models of a store over HTTP; `serve --help` lists all options."""
    settings, print_config = read_serve_settings(context.args)
    if print_config:
        out.print_json(data=settings.printable())
        return
    from service.supervisor import supervise

    settings.check_access()
    if settings.cost_tables is not None:
        read_tables(settings.cost_tables)  # better refused here than by every engine
    configure_logs(settings.log_level, settings.log_format)
    supervise(settings)


def read_serve_settings(arguments: list[str]) -> tuple[Settings, bool]:
    """Read the settings from flags, environment and file, and whether they are to be printed.

    Raises:
        SettingsError: a key is unknown or a value is wrong.
    """
    arguments = list(arguments)
    print_config = "--print-config" in arguments
    if print_config:
        arguments.remove("--print-config")
    arguments = [part for a in arguments for part in _split_config(a)]
    if "--config" in arguments:
        place = arguments.index("--config")
        if place + 1 >= len(arguments):
            raise SettingsError("--config needs a file")
        os.environ[f"{PREFIX}{CONFIG_FILE.upper()}"] = arguments[place + 1]
        del arguments[place : place + 2]
    file = os.environ.get(f"{PREFIX}{CONFIG_FILE.upper()}")
    if file and not Path(file).is_file():
        raise SettingsError(f"{file}: no such file")
    refuse_unknown_environment()
    try:
        source: CliSettingsSource[Any] = CliSettingsSource(Settings, cli_parse_args=arguments)
        return Settings(_cli_settings_source=source), print_config  # type: ignore[call-arg]
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise SettingsError(f"{where}: {first['msg']}" if where else first["msg"]) from error
    except (SourceError, ValueError) as error:
        raise SettingsError(str(error)) from error


@app.command()
def classify(
    texts: Annotated[
        list[str] | None, typer.Argument(help="Texts; none: stdin, one per line.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Model name, or a checkpoint folder.")] = None,
    file: Annotated[
        Path | None, typer.Option(help="CSV, JSONL or Parquet with a column `text`.")
    ] = None,
    quality: Annotated[
        str, typer.Option(help="fast, balanced, best or points given up.")
    ] = "balanced",
    heads: Annotated[int | None, typer.Option(help="Heads per layer, instead of f_o.")] = None,
    as_json: JsonOption = False,
    model_store: StoreOption = Path("model_store"),
) -> None:
    """Classify texts here, without a server."""
    import dataclasses

    from budgetformer.classifier import Classifier, Prediction

    if file is not None:
        from budgetformer.training.data import read_texts

        given, pairs = read_texts(file)
    else:
        given, pairs = texts or [line.rstrip("\n") for line in sys.stdin], None
    checkpoint = _resolve(model, model_store)
    level: str | float = quality if quality in QUALITY_NAMES else _points(quality)
    checkpoint.rule(level if checkpoint.calibrated else None, heads)
    classifier = Classifier(checkpoint.path)
    predictions: list[Prediction] = []
    with Progress(console=err, transient=True, disable=not err.is_terminal) as bar:
        task = bar.add_task("classifying", total=len(given))
        for start in range(0, len(given), CLASSIFY_BATCH):
            rows = slice(start, start + CLASSIFY_BATCH)
            predictions += classifier(given[rows], pairs[rows] if pairs else None, level, heads)
            bar.update(task, completed=len(predictions))
    if as_json or not out.is_terminal:
        for text, prediction in zip(given, predictions, strict=True):
            line = {"text": text, **dataclasses.asdict(prediction)}
            typer.echo(json.dumps(line, ensure_ascii=False))
        return
    table = Table("label", "score", "budget", "heads", "of dense", "text")
    for text, prediction in zip(given, predictions, strict=True):
        table.add_row(
            prediction.label,
            f"{prediction.score:.3f}",
            str(prediction.budget),
            str(prediction.heads),
            f"{prediction.macs / prediction.dense_macs:.1%}",
            text[:80],
        )
    out.print(table)


@app.command()
def train(
    data: Annotated[
        Path, typer.Option(help="Folder with train and test files, or the training file.")
    ],
    output: Annotated[
        Path, typer.Option("--out", help="Checkpoint folder, <store>/<name>/<version>.")
    ],
    start: Annotated[
        str | None,
        typer.Option(help="Folder of a BERT-shaped encoder, or `minilm-l6`; none: from scratch."),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(help="TOML file of the recipe, or a packaged one: `paper`, `paper-small`."),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Everything random follows from it.")] = None,
    work_dir: Annotated[Path | None, typer.Option(help="State of the run, to go on from.")] = None,
    threads: Annotated[int | None, typer.Option(help="Threads; none: all cores.")] = None,
    baseline: Annotated[
        Path | None,
        typer.Option(help="Also keep the dense network here, for `evaluate --report`."),
    ] = None,
) -> None:
    """Train, calibrate and write a checkpoint; an interrupted run goes on where it was."""
    from budgetformer.training.pipeline import train_checkpoint
    from budgetformer.training.recipe import Recipe

    train_checkpoint(
        data=data,
        output=output,
        start=start,
        recipe=Recipe.read(recipe, seed=seed),
        work_dir=work_dir or output.parent / f".{output.name}.work",
        threads=threads,
        log=err.print,
        baseline=baseline,
    )


@app.command()
def calibrate(
    data: Annotated[Path, typer.Option(help="Labelled texts that training never saw.")],
    output: Annotated[Path, typer.Option("--out", help="New checkpoint folder.")],
    model: Annotated[str | None, typer.Option(help="Model name, or a checkpoint folder.")] = None,
    model_store: StoreOption = Path("model_store"),
) -> None:
    """Find a checkpoint's quality levels anew, on your own texts."""
    from budgetformer.training.pipeline import recalibrate

    manifest = recalibrate(_resolve(model, model_store), data, output, err.print)
    table = Table("quality", "accuracy", "95 %", "points lost", "of dense", "mean heads")
    for point in manifest.operating_points:
        if point.name:
            low, high = point.interval or (0.0, 1.0)
            table.add_row(
                point.name,
                f"{point.accuracy:.4f}",
                f"{low:.4f}..{high:.4f}",
                f"{point.points_lost:+.2f}",
                f"{point.macs_share:.1%}",
                f"{point.mean_heads:.2f}",
            )
    out.print(table)


@app.command()
def evaluate(
    data: Annotated[Path, typer.Option(help="Labelled CSV, JSONL or Parquet file.")],
    model: Annotated[str | None, typer.Option(help="Model name, or a checkpoint folder.")] = None,
    url: Annotated[
        str | None, typer.Option(help="Ask this server instead of computing here.")
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(help="Write the frontier report (Markdown, JSON, plots) to this folder."),
    ] = None,
    baseline: Annotated[
        Path | None,
        typer.Option(help="Dense network that `train --baseline` kept, for the report."),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Use this many rows, evenly chosen.")
    ] = None,
    as_json: JsonOption = False,
    model_store: StoreOption = Path("model_store"),
) -> None:
    """Report accuracy and cost of every quality level, and of the full budget."""
    from budgetformer.training.evaluation import evaluate_checkpoint, read_test, through_http

    checkpoint = _resolve(model, model_store)
    examples = read_test(checkpoint, data, limit)
    if report is not None:
        if url is not None:
            raise typer.BadParameter("a report is made here, it cannot ask a server")
        _report(checkpoint, examples, report, baseline)
        return
    ask = None if url is None else through_http(url, checkpoint)
    rows = evaluate_checkpoint(checkpoint, examples, ask)
    if as_json:
        out.print_json(data=[row.as_dict() for row in rows])
        return
    columns = ("quality", "n", "accuracy", "95 %", "mean heads", "mean MACs", "of dense")
    table = Table(*columns, "budgets in use")
    for row in rows:
        table.add_row(*row.cells())
    out.print(table)


def _report(
    checkpoint: Checkpoint, examples: Examples, folder: Path, baseline: Path | None
) -> None:
    from budgetformer.training.baseline import read_baseline
    from budgetformer.training.report import report_checkpoint
    from budgetformer.training.report_files import write_report

    dense = None if baseline is None else read_baseline(baseline)
    write_report(report_checkpoint(checkpoint, examples, dense), folder)
    out.print(Markdown((folder / "README.md").read_text()))


@app.command()
def tune(
    output: Annotated[
        Path, typer.Option("--out", help="Folder for the table, which `serve --cost-tables` reads.")
    ],
    model: Annotated[str | None, typer.Option(help="Model name, or a checkpoint folder.")] = None,
    dtype: Annotated[
        Precision, typer.Option(help="Precision of the pass; auto takes the fastest here.")
    ] = "auto",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    threads: Annotated[int, typer.Option(min=1, help="Threads of an engine.")] = 1,
    as_json: JsonOption = False,
    model_store: StoreOption = Path("model_store"),
) -> None:
    """Measure what a model's batches cost in seconds on this device, for the scheduler."""
    import torch

    from budgetformer.classifier import load_network
    from budgetformer.tune import measure_costs

    torch.set_num_threads(threads)
    checkpoint = _resolve(model, model_store)
    costs = measure_costs(load_network(checkpoint, device, dtype), checkpoint.label)
    output.mkdir(parents=True, exist_ok=True)
    (output / f"{checkpoint.name}-{checkpoint.version}.json").write_text(costs.dump())
    if as_json:
        out.print_json(costs.dump())
        return
    title = f"{costs.model} on {costs.device} in {costs.dtype}, microseconds"
    table = Table("step", "per batch", "per token", "per item", title=title)
    for step, cost in enumerate(costs.steps):
        micro = (1e6 * cost.constant, 1e6 * cost.token, 1e6 * cost.item)
        table.add_row(str(step), *(f"{value:.2f}" for value in micro))
    out.print(table)


@bench_app.command("pass")
def bench_pass(
    model: Annotated[str | None, typer.Option(help="Model name, or a checkpoint folder.")] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="Real texts, CSV, JSONL or Parquet; none: random tokens."),
    ] = None,
    folder: Annotated[
        Path | None, typer.Option("--out", help="Also write Markdown, JSON and a plot here.")
    ] = None,
    batch: Annotated[
        list[int] | None, typer.Option(min=1, help="Texts in a batch; may be repeated.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=2, help="Turns that each way takes.")] = 9,
    threads: Annotated[int, typer.Option(min=1, help="Threads of every way.")] = 1,
    rivals: Annotated[
        bool, typer.Option(help="Time the dense network in Transformers and ONNX Runtime too.")
    ] = True,
    as_json: JsonOption = False,
    model_store: StoreOption = Path("model_store"),
) -> None:
    """Time every ladder step and quality level beside the dense network in other libraries."""
    from budgetformer.bench.report import BATCHES, COLUMNS, compare_passes, write_bench_report

    texts = None
    batches = tuple(batch or BATCHES)
    if data is not None:
        from budgetformer.training.data import read_texts

        texts, _ = read_texts(data)
    checkpoint = _resolve(model, model_store)
    report = compare_passes(checkpoint, texts, batches, rounds, threads, rivals)
    if folder is not None:
        write_bench_report(report, folder)
    if as_json:
        out.print_json(data=report.as_dict())
        return
    for size in report.batches:
        table = Table(*COLUMNS, title=f"batches of {size}")
        for row in report.rows(size):
            table.add_row(*row)
        out.print(table)


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
                levels = ", ".join(p.name for p in c.manifest.operating_points if p.name)
                sizes = f"{c.num_layers} x {c.num_heads}"
                table.add_row(c.name, str(c.version), str(len(c.manifest.labels)), sizes, levels)
        out.print(table)
    _complain(store.errors)


@models_app.command("show")
def show_model(model: str, model_store: StoreOption = Path("model_store")) -> None:
    """Print a checkpoint's manifest."""
    out.print_json(_resolve(model, model_store).manifest.model_dump_json())


@models_app.command("verify")
def verify_models(
    model: Annotated[str | None, typer.Argument(help="Model name or folder; none: all.")] = None,
    model_store: StoreOption = Path("model_store"),
) -> None:
    """Check every file of a checkpoint, or of all, against its manifest."""
    store = read_store(model_store) if model is None else None
    checkpoints = (
        [c for versions in store.checkpoints.values() for c in versions]
        if store
        else [_resolve(model, model_store)]
    )
    problems = list(store.errors) if store else []
    for checkpoint in checkpoints:
        try:
            checkpoint.verify()
        except CheckpointError as error:
            problems.append(str(error))
        else:
            files = len(checkpoint.manifest.files)
            out.print(f"{checkpoint.label}: {files} files as the manifest says", soft_wrap=True)
    _complain(problems)


@keys_app.callback()
def _keys_root() -> None:
    """Make keys for callers of a server."""


@keys_app.command("new")
def make_key(
    name: Annotated[str, typer.Argument(help="Name of the key, as metrics and logs show it.")],
    scope: Annotated[
        list[str] | None,
        typer.Option(help="What it opens, classify or admin; may be repeated; none: classify."),
    ] = None,
    texts_per_second: Annotated[
        float | None, typer.Option(help="Texts that it may ask for in the long run.")
    ] = None,
    burst: Annotated[
        int | None, typer.Option(help="Texts that it may ask for at once; none: a second's.")
    ] = None,
    max_requests: Annotated[
        int | None, typer.Option(help="Requests that it may have under way at once.")
    ] = None,
) -> None:
    """Make a key: it is shown once, on stderr; its line for the key file goes to stdout."""
    limits = {
        "texts_per_second": texts_per_second, "burst": burst, "max_requests": max_requests,
    }  # fmt: skip
    secret, key = new_key(scope or ["classify"], **limits)
    check_keys({name: key})
    typer.echo(key_line(name, key))
    err.print("The key, shown this once:", style="dim")
    typer.echo(secret, err=True)


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(budgetformer.__version__)


def _complain(problems: list[str]) -> None:
    for problem in problems:
        _say(problem)
    if problems:
        raise typer.Exit(2)


def _split_config(argument: str) -> list[str]:
    name, equals, value = argument.partition("=")
    return [name, value] if equals and name == "--config" else [argument]


def _say(problem: str) -> None:
    """Print one error on one line, however long it is."""
    err.print(problem, style="red", markup=False, highlight=False, soft_wrap=True)


def _resolve(model: str | None, model_store: Path) -> Checkpoint:
    """Find a checkpoint by folder, `name` or `name:version`.

    None: the only or first of the store.
    """
    if model is not None and (Path(model) / "manifest.json").is_file():
        return read_checkpoint(Path(model))
    store = read_store(model_store)
    name, _, number = (model or next(iter(sorted(store.checkpoints)), "")).partition(":")
    if number:
        return read_checkpoint(model_store / name / number)
    return store.latest(name)


def _points(quality: str) -> float:
    try:
        return float(quality)
    except ValueError:
        raise SettingsError(f"quality {quality!r} is neither a level nor a number") from None


def main() -> None:
    """Run the command line; an expected error is one line and exit code 2."""
    try:
        app()
    except BudgetFormerError as error:
        _say(f"budgetformer: {error}")
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
