"""`budgetformer train`, `import`, `calibrate`, `recalibrate` and `evaluate`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.markdown import Markdown
from rich.table import Table

from budgetformer.checkpoint.manifest import CORE_HOUR_PRICE, FULL, Manifest
from budgetformer.checkpoint.store import Checkpoint, next_version, read_checkpoint
from budgetformer.cost.table import read_tables
from budgetformer.errors import DataError
from budgetformer.inference.policy import Measure
from service.cli.terminal import JsonOption, ModelOption, StoreOption, note, out, resolve

if TYPE_CHECKING:
    from budgetformer.training.data import Examples


DataOption = Annotated[
    Path, typer.Option(help="Folder with train and test files, or the training file.")
]
OutOption = Annotated[
    Path, typer.Option("--out", help="Checkpoint folder, <store>/<name>/<version>.")
]
RecipeOption = Annotated[
    str | None,
    typer.Option(help="TOML file of the recipe, or a packaged one: `paper`, `paper-small`."),
]
SeedOption = Annotated[int | None, typer.Option(help="Random seed.")]
WorkOption = Annotated[
    Path | None, typer.Option(help="Folder for the state of the run, to resume from.")
]
ThreadsOption = Annotated[
    int | None, typer.Option(min=1, help="Number of threads. Default: one per core.")
]
DeviceOption = Annotated[
    Literal["auto", "cpu", "cuda"],
    typer.Option(help="Device to train on. auto: a GPU if there is one."),
]
MicroBatchOption = Annotated[
    int | None,
    typer.Option(min=1, help="Items in one forward pass, if a batch needs too much memory."),
]
PriceOption = Annotated[
    float,
    typer.Option(min=0, help="Price of one core for one hour, for the cost of a million texts."),
]
Effort = Literal["minutes", "hours"]


def train(
    data: DataOption,
    output: OutOption,
    start: Annotated[
        str | None,
        typer.Option(
            help="Folder of an encoder, its id on the Hugging Face hub, or `minilm-l6`. Default: "
            "train from scratch."
        ),
    ] = None,
    recipe: RecipeOption = None,
    seed: SeedOption = None,
    work_dir: WorkOption = None,
    threads: ThreadsOption = None,
    device: DeviceOption = "auto",
    micro_batch: MicroBatchOption = None,
    as_json: JsonOption = False,
) -> None:
    """Train, calibrate and write a checkpoint; resume the run if it was interrupted."""
    from budgetformer.training.pipeline import train_checkpoint
    from budgetformer.training.recipe import Recipe

    wrote = train_checkpoint(
        data=data,
        output=output,
        start=start,
        recipe=Recipe.read(recipe, seed=seed),
        work_dir=work_dir or output.parent / f".{output.name}.work",
        threads=threads,
        log=note,
        device=device,
        micro_batch=micro_batch,
    )
    if wrote:
        _show_levels(read_checkpoint(output).manifest, as_json)


def import_encoder(
    encoder: Annotated[
        str,
        typer.Argument(
            help="Folder of an encoder or classifier, its id on the Hugging Face hub, or "
            "`minilm-l6`."
        ),
    ],
    output: OutOption,
    data: Annotated[
        Path | None, typer.Option(help="Folder with labelled train and test files, or a file.")
    ] = None,
    texts: Annotated[
        Path | None,
        typer.Option(
            help="Texts without labels (CSV, JSONL, Parquet), for a classifier: they train budgets "
            "on its own answers. A column `label` only serves to report accuracy."
        ),
    ] = None,
    effort: Annotated[
        Effort,
        typer.Option(
            help="With --texts: `minutes` leaves the classifier unchanged, `hours` trains every "
            "step."
        ),
    ] = "minutes",
    recipe: RecipeOption = None,
    seed: SeedOption = None,
    work_dir: WorkOption = None,
    threads: ThreadsOption = None,
    device: DeviceOption = "auto",
    micro_batch: MicroBatchOption = None,
    core_hour_price: PriceOption = CORE_HOUR_PRICE,
    as_json: JsonOption = False,
) -> None:
    """Give budgets to an encoder, with labelled data, or to a classifier, with texts alone."""
    if (data is None) == (texts is None):
        raise typer.BadParameter(
            "give either --data (labelled texts) or --texts (texts without labels)"
        )
    if data is not None:
        train(
            *(data, output, encoder, recipe, seed, work_dir, threads),
            *(device, micro_batch, as_json),
        )
        return
    assert texts is not None
    from budgetformer.adoption.budgets import add_budgets
    from budgetformer.model_folder import model_folder
    from budgetformer.training.recipe import Recipe

    wrote = add_budgets(
        classifier=model_folder(encoder),
        texts=texts,
        output=output,
        recipe=Recipe.read(recipe or effort, seed=seed),
        work_dir=work_dir or output.parent / f".{output.name}.work",
        threads=threads,
        log=note,
        device=device,
        micro_batch=micro_batch,
        core_hour_price=core_hour_price,
    )
    if wrote:
        _show_levels(read_checkpoint(output).manifest, as_json)


def calibrate(
    data: Annotated[
        Path,
        typer.Option(
            help="Texts that were not used in training; with labels, unless --measure agreement."
        ),
    ],
    output: Annotated[Path, typer.Option("--out", help="New checkpoint folder.")],
    model: ModelOption = None,
    measure: Annotated[
        Measure,
        typer.Option(
            help="Measure that a level may lower: accuracy, or agreement with the full network, "
            "which needs no labels."
        ),
    ] = "accuracy",
    cost_tables: Annotated[
        Path | None,
        typer.Option(help="Cost tables of `tune`: minimize seconds instead of multiply-adds."),
    ] = None,
    as_json: JsonOption = False,
    model_store: StoreOption = Path("model_store"),
) -> None:
    """Search a checkpoint's chain of steps and quality levels again, on your own texts."""
    from budgetformer.adoption.recalibration import recalibrate

    checkpoint = resolve(model, model_store)
    costs = None
    if cost_tables is not None:
        costs = read_tables(cost_tables).get(checkpoint.label)
        if costs is None:
            raise DataError(f"{cost_tables}: no table of {checkpoint.label}")
    manifest = recalibrate(checkpoint, data, output, note, measure=measure, costs=costs)
    _show_levels(manifest, as_json)


def recalibrate(
    model: Annotated[str, typer.Argument(help="Model name, `name:version`, or a folder.")],
    texts: Annotated[
        Path, typer.Option(help="Texts of current production traffic (CSV, JSONL, Parquet).")
    ],
    as_json: JsonOption = False,
    model_store: StoreOption = Path("model_store"),
) -> None:
    """Write the next version of a model, with levels calibrated on texts without labels.

    The levels are calibrated for agreement with the model's full budget. A server that polls its
    store serves the new version without a restart.
    """
    from budgetformer.adoption.recalibration import recalibrate as run

    checkpoint = resolve(model, model_store)
    folder = checkpoint.path.parent
    output = folder / str(next_version(folder))
    _show_levels(run(checkpoint, texts, output, note, measure="agreement"), as_json)


def _show_levels(manifest: Manifest, as_json: bool) -> None:
    levels = list(manifest.named_levels.values())
    timing = manifest.timing
    if as_json:
        out.print_json(data=[level.model_dump(mode="json") for level in levels])
        return
    if manifest.policy is not None:
        out.print(f"Steps: {', '.join(map(str, manifest.policy.chain))}")
    table = Table("quality", manifest.measure, "95 %", "of dense")
    scored = timing is not None and any(level.accuracy is not None for level in levels)
    for name in ("ms/text", "price/M") if timing else ("accuracy drop", "mean heads"):
        table.add_column(name)
    if scored:
        table.add_column("accuracy")
    for level in levels:
        reached, bounds = level.reached(manifest.measure)
        name = str(level.name)
        if timing is None:
            cells: tuple[str, ...] = (f"{level.points_lost:+.2f}", f"{level.mean_heads:.2f}")
        else:
            cells = (f"{timing.milliseconds[name]:.3f}", timing.price_text(name))
        if scored:
            cells += ("" if level.accuracy is None else f"{level.accuracy:.4f}",)
        interval = f"{bounds[0]:.3f}-{bounds[1]:.3f}"
        table.add_row(name, f"{reached:.4f}", interval, f"{level.macs_share:.1%}", *cells)
    out.print(table)
    if timing is not None:
        dense = f"{timing.milliseconds[FULL]:.3f} ms per text, {timing.price_text(FULL)} a million"
        out.print(f"All heads: {dense} ({timing.processor}, {timing.precision}).")
    _show_steps({str(level.name): level.budgets for level in levels})


def _show_steps(budgets: Mapping[str, Mapping[int, float]]) -> None:
    """Print the share of the texts that ended at each step, by quality level."""
    steps = sorted({step for shares in budgets.values() for step in shares})
    table = Table("texts that end at", *(f"step {step}" for step in steps))
    for name, shares in budgets.items():
        table.add_row(name, *(f"{shares.get(step, 0.0):.1%}" for step in steps))
    out.print(table)


def evaluate(
    data: Annotated[
        Path,
        typer.Option(
            help="CSV, JSONL or Parquet file, or a folder with `test.*`. Without a column `label`, "
            "only agreement is reported."
        ),
    ],
    model: ModelOption = None,
    url: Annotated[
        str | None, typer.Option(help="Server to evaluate instead of computing here.")
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(help="Write the frontier report (Markdown, JSON, plots) to this folder."),
    ] = None,
    baseline: Annotated[
        Path | None,
        typer.Option(help="Folder of `budgetformer.experiments.baselines`, for the report."),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Number of rows to use, evenly chosen.")
    ] = None,
    core_hour_price: PriceOption = CORE_HOUR_PRICE,
    as_json: JsonOption = False,
    model_store: StoreOption = Path("model_store"),
) -> None:
    """Report accuracy, agreement and cost of every quality level, and of the full budget."""
    from budgetformer.training.evaluation import evaluate_checkpoint, read_test, through_http

    checkpoint = resolve(model, model_store)
    examples = read_test(checkpoint, data, limit)
    if report is not None:
        if url is not None:
            raise typer.BadParameter("--report and --url cannot be combined")
        _report(checkpoint, examples, report, baseline, core_hour_price)
        return
    ask = None if url is None else through_http(url, checkpoint)
    rows = evaluate_checkpoint(checkpoint, examples, ask)
    if as_json:
        out.print_json(data=[row.as_dict() for row in rows])
        return
    columns = ("quality", "accuracy", "95 %", "as full", "heads", "MACs", "of dense")
    table = Table(*columns, title=f"{checkpoint.label} on {rows[0].rows} texts")
    for row in rows:
        table.add_row(*row.cells())
    out.print(table)
    _show_steps({row.quality: row.budgets for row in rows})
    cheaper = sum(row.cheaper for row in rows)
    out.print(f"Texts that cost less at a higher level than at the one before: {cheaper}")


def _report(
    checkpoint: Checkpoint,
    examples: Examples,
    folder: Path,
    baseline: Path | None,
    core_hour_price: float,
) -> None:
    """Write the report of the levels and, if the texts have labels, of the frontier."""
    from budgetformer.adoption.costs import measure_levels
    from budgetformer.adoption.report import PAGE, write_levels
    from budgetformer.experiments.baselines import read_baseline
    from budgetformer.experiments.report import report_checkpoint
    from budgetformer.experiments.report_files import write_report
    from budgetformer.training.evaluation import evaluate_checkpoint

    timing = measure_levels(checkpoint, examples, core_hour_price)
    write_levels(checkpoint.label, evaluate_checkpoint(checkpoint, examples), timing, folder)
    out.print(Markdown((folder / PAGE).read_text()))
    if not len(examples.labels):
        return
    dense = None if baseline is None else read_baseline(baseline)
    write_report(report_checkpoint(checkpoint, examples, dense), folder)
    out.print(Markdown((folder / "README.md").read_text()))
