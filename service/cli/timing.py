"""`budgetformer tune` and `bench`: measure the speed of this machine."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from budgetformer.checkpoint.store import Checkpoint
from budgetformer.cost.table import SERVER_FILE, read_tables
from budgetformer.errors import DataError
from budgetformer.inference.precision import Precision
from service.cli.terminal import JsonOption, ModelOption, StoreOption, out, print_errors, resolve
from service.process import keep_large_blocks

DataOption = Annotated[
    Path | None, typer.Option(help="Texts: CSV, JSONL or Parquet. Default: random tokens.")
]

bench_app = typer.Typer(no_args_is_help=True, help="Measure the speed of passes.")


def tune(
    output: Annotated[
        Path, typer.Option("--out", help="Folder for the table; use it in `serve --cost-tables`.")
    ],
    model: ModelOption = None,
    dtype: Annotated[
        Precision, typer.Option(help="Precision of the pass. auto: the one that engines use.")
    ] = "auto",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    threads: Annotated[int, typer.Option(min=1, help="Threads of an engine.")] = 1,
    url: Annotated[
        str | None,
        typer.Option(
            help="Measure an idle server instead: the cost of requests outside of batches, for "
            "`simulate`. The table must be in --out."
        ),
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Texts to send to --url: CSV, JSONL or Parquet.")
    ] = None,
    as_json: JsonOption = False,
    model_store: StoreOption = Path("model_store"),
) -> None:
    """Measure the seconds that a model's batches take on this device, for the scheduler."""
    if url is not None:
        if data is None:
            raise typer.BadParameter("--url requires --data")
        _tune_server(output, resolve(model, model_store), url, data, as_json)
        return
    import torch

    from budgetformer.checkpoint.loading import load_network
    from budgetformer.inference.tune import measure_costs

    torch.set_num_threads(threads)
    keep_large_blocks()  # as engines do
    checkpoint = resolve(model, model_store)
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


def _tune_server(folder: Path, checkpoint: Checkpoint, url: str, data: Path, as_json: bool) -> None:
    from budgetformer.tables import read_texts
    from service.simulation.calibrate import calibrate
    from service.simulation.engine import SimModel

    tables = read_tables(folder)
    if checkpoint.label not in tables:
        raise DataError(f"{folder}: no cost table of {checkpoint.label}")
    texts, _ = read_texts(data)
    costs = calibrate(url, checkpoint, SimModel.of(checkpoint, tables[checkpoint.label]), texts)
    (folder / SERVER_FILE).write_text(costs.dump())
    if as_json:
        out.print_json(costs.dump())
        return
    table = Table("", "per request", "per text", "per token", "per pass", title="microseconds")
    for name, cost in (("frontend", costs.frontend), ("hub", costs.hub)):
        table.add_row(name, *(f"{1e6 * c:.2f}" for c in (cost.request, cost.text, cost.token)), "")
    engine = costs.engine
    micro = [f"{1e6 * cost:.2f}" for cost in (engine.request, engine.text, engine.run)]
    table.add_row("engine, outside of passes", *micro[:2], "", micro[2])
    table.add_row("transfer", f"{1e6 * costs.way:.2f}", "", "", "")
    out.print(table)


@bench_app.command("pass")
def bench_pass(
    model: ModelOption = None,
    data: DataOption = None,
    folder: Annotated[
        Path | None, typer.Option("--out", help="Also write Markdown, JSON and a plot here.")
    ] = None,
    batch: Annotated[
        list[int] | None, typer.Option(min=1, help="Texts in a batch; may be repeated.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=2, help="Measurements of each variant.")] = 9,
    threads: Annotated[int, typer.Option(min=1, help="Threads of each variant.")] = 1,
    baselines: Annotated[
        bool,
        typer.Option(
            "--baselines/--no-baselines",
            "--rivals/--no-rivals",  # the old name of the option
            help="Also time the dense network in Transformers and ONNX Runtime.",
        ),
    ] = True,
    as_json: JsonOption = False,
    model_store: StoreOption = Path("model_store"),
) -> None:
    """Time each ladder step and quality level, and the dense network in other libraries."""
    from budgetformer.bench.report import BATCHES, COLUMNS, compare_passes, write_bench_report

    keep_large_blocks()  # as engines do
    texts = None
    batches = tuple(batch or BATCHES)
    if data is not None:
        from budgetformer.tables import read_texts

        texts, _ = read_texts(data)
    checkpoint = resolve(model, model_store)
    report = compare_passes(checkpoint, texts, batches, rounds, threads, baselines)
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


@bench_app.command("agreement")
def bench_agreement(
    data: Annotated[Path, typer.Option(help="Texts: CSV, JSONL or Parquet.")],
    model: ModelOption = None,
    dtype: Annotated[
        Precision, typer.Option(help="Precision to compare with float32.")
    ] = "bfloat16",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    as_json: JsonOption = False,
    model_store: StoreOption = Path("model_store"),
) -> None:
    """Count the texts whose label differs between a precision and float32, at each quality."""
    from budgetformer.bench.agreement import compare_labels
    from budgetformer.checkpoint.loading import load_network
    from budgetformer.tables import read_texts

    checkpoint = resolve(model, model_store)
    texts, _ = read_texts(data)
    plain, other = (load_network(checkpoint, device, p) for p in ("float32", dtype))
    agreements = compare_labels(checkpoint, texts, plain, other)
    if as_json:
        out.print_json(data=[asdict(agreement) for agreement in agreements])
        return
    title = f"{checkpoint.label}, {other.precision} against float32, {len(texts)} texts"
    columns = ("quality", "same label", "other label", "at another step", "logits differ by")
    table = Table(*columns, title=title)
    for level in agreements:
        moved, difference = str(level.moved), f"{level.difference:.4f}"
        table.add_row(level.way, f"{100 * level.share:.2f} %", str(level.other), moved, difference)
    out.print(table)


@bench_app.command("gpu")
def bench_gpu(
    model: ModelOption = None,
    data: DataOption = None,
    folder: Annotated[
        Path | None, typer.Option("--out", help="Also write Markdown and JSON here.")
    ] = None,
    device: Annotated[str, typer.Option(help="cuda, or cpu for a dry run.")] = "cuda",
    limit: Annotated[int, typer.Option(min=2, help="Most texts to use.")] = 4096,
    tokens: Annotated[
        list[int] | None, typer.Option(min=1, help="Tokens in a batch; may be repeated.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Batches in a measurement.")] = 24,
    model_store: StoreOption = Path("model_store"),
) -> None:
    """Check and time a checkpoint on a GPU: errors, labels, waits, times and memory."""
    import torch

    from budgetformer.bench.gpu import TOKENS, as_markdown, write_gpu_report
    from budgetformer.bench.gpu import bench_gpu as run

    if device == "cuda" and not torch.cuda.is_available():
        print_errors(["torch finds no GPU; use --device cpu for a dry run"])
    texts = None
    if data is not None:
        from budgetformer.tables import read_texts

        texts = read_texts(data)[0][:limit]
    report = run(resolve(model, model_store), texts, device, tuple(tokens or TOKENS), rounds)
    if folder is not None:
        write_gpu_report(report, folder)
    out.print(as_markdown(report), markup=False, soft_wrap=True)
