"""`budgetformer simulate`: predict how servers handle traffic."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.table import Table

from budgetformer.checkpoint.store import Checkpoint
from budgetformer.cores import usable_cores
from budgetformer.cost.table import CostTable, read_tables
from budgetformer.errors import DataError, PolicyError
from budgetformer.inference.policy import QUALITY_NAMES
from service.cli.serve import read_serve_settings
from service.cli.terminal import FAILED, JsonOption, ModelOption, out, print_error, resolve
from service.settings import Settings, SettingsError

if TYPE_CHECKING:
    from service.simulation.plan import Plan
    from service.simulation.texts import Population
    from service.simulation.traffic import Traffic

MAX_TEXTS = 2000
"""Most rows of --data that are measured; they are chosen evenly."""


def simulate(
    context: typer.Context,
    model: ModelOption = None,
    rate: Annotated[
        float | None,
        typer.Option(min=1e-3, help="Mean texts per second. Default: those of the traffic file."),
    ] = None,
    traffic: Annotated[
        str,
        typer.Option(
            help="steady, diurnal (one day within --seconds), bursts, or a file: a server's JSON "
            "log, or a response of /playground/recent."
        ),
    ] = "steady",
    log_share: Annotated[
        float,
        typer.Option(
            min=1e-6, max=1, help="Setting `access_log` of the server that wrote the log."
        ),
    ] = 1.0,
    seconds: Annotated[float, typer.Option(min=1, help="Length of generated traffic.")] = 60.0,
    bulk_share: Annotated[
        float, typer.Option(min=0, max=1, help="Share of the texts that come in requests of 512.")
    ] = 0.0,
    data: Annotated[
        Path | None,
        typer.Option(
            help="Your texts: CSV, JSONL or Parquet. Default: generated texts, as in calibration."
        ),
    ] = None,
    mean_tokens: Annotated[
        float, typer.Option(min=3, help="Mean tokens of generated texts.")
    ] = 50.0,
    tail: Annotated[
        float | None,
        typer.Option(min=1.05, help="Index of a Pareto tail of the lengths of generated texts."),
    ] = None,
    hard_share: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Share of the texts that enter the encoder at `balanced`."),
    ] = None,
    servers: Annotated[
        int, typer.Option(min=0, help="Number of servers. 0: as many as the goals require.")
    ] = 0,
    cores: Annotated[
        int, typer.Option(min=0, help="Cores of each server. 0: as many as this machine has.")
    ] = 0,
    router: Annotated[
        Literal["random", "turns", "two", "least"],
        typer.Option(
            help="Router before the servers: random, round robin, the less loaded of two random "
            "servers, or the least loaded of all."
        ),
    ] = "two",
    sample: Annotated[int, typer.Option(min=1, help="Most servers to simulate.")] = 8,
    p99_ms: Annotated[float, typer.Option(min=1, help="Goal: highest p99 latency (ms).")] = 250.0,
    lost: Annotated[
        float, typer.Option(min=0, max=1, help="Goal: highest share of refused or late requests.")
    ] = 0.001,
    lowered: Annotated[
        float, typer.Option(min=0, max=1, help="Goal: highest share of answers at lowered quality.")
    ] = 0.01,
    core_hour: Annotated[
        float | None, typer.Option(min=0, help="Price of one core for one hour.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Write a plot of load and latency over time, PNG or SVG.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Random seed.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Predict how servers handle traffic, or how many servers it needs.

    Also takes the options of `serve`; --cost-tables is the folder of the results of `tune` and
    `tune --url`.
    """
    from service.simulation.costs import read_costs
    from service.simulation.engine import SimModel
    from service.simulation.fleet import Fleet, run
    from service.simulation.plan import Goals, Plan, servers_needed

    settings, _ = read_serve_settings(context.args)
    checkpoint = resolve(model or settings.default_model, settings.model_store)
    load = _traffic(traffic, rate, seconds, bulk_share, log_share, seed)
    fleet = Fleet(
        model=SimModel.of(checkpoint, _table(checkpoint, settings)),
        population=_texts(checkpoint, data, mean_tokens, tail, hard_share, seed),
        settings=settings,
        costs=read_costs(_folder(settings)),
        cores=cores or usable_cores(),
        servers=max(servers, 1),
        sample=min(sample, servers) if servers else sample,
        router=router,
    )
    goals = Goals(p99_ms / 1000, lost, lowered)
    if servers:
        plan = Plan(load.mean_rate / servers, servers, run(fleet, load, seed))
    else:
        plan = servers_needed(fleet, load, goals, seed)
    if plan.run is None:
        print_error("budgetformer: no number of such servers meets these goals")
        raise typer.Exit(FAILED)
    if plot is not None:
        from service.simulation.plots import draw_run

        draw_run(plan.run, plot)
    figures = _figures(plan, load, goals.met_by(plan.run.summary), core_hour)
    if as_json:
        out.print_json(data=figures)
    else:
        out.print(_as_table(figures))


def _folder(settings: Settings) -> Path:
    if settings.cost_tables is None:
        raise SettingsError("--cost-tables is required: the folder that `budgetformer tune` wrote")
    return settings.cost_tables


def _table(checkpoint: Checkpoint, settings: Settings) -> CostTable:
    """Read the cost table of a checkpoint.

    Raises:
        PolicyError: the checkpoint or the settings have no named quality level.
        DataError: there is no table of the checkpoint.
    """
    folder = _folder(settings)
    if not checkpoint.calibrated:
        raise PolicyError(f"{checkpoint.label} is not calibrated: it has no quality levels")
    if isinstance(settings.quality, float):
        raise PolicyError("--quality must be auto, fast, balanced or best for a simulation")
    tables = read_tables(folder)
    if checkpoint.label not in tables:
        raise DataError(f"{folder}: no cost table of {checkpoint.label}")
    return tables[checkpoint.label]


def _traffic(
    kind: str,
    rate: float | None,
    seconds: float,
    bulk_share: float,
    log_share: float,
    seed: int,
) -> Traffic:
    from service.simulation.traffic import bursts, diurnal, read_traffic, steady

    generators = {
        "steady": lambda rate: steady(rate, seconds),
        "diurnal": lambda rate: diurnal(rate, seconds),
        "bursts": lambda rate: bursts(rate, seconds, seed),
    }
    if kind not in generators:
        traffic = read_traffic(Path(kind), log_share)
        traffic = traffic.of_texts(bulk_share) if bulk_share else traffic
        return traffic if rate is None else traffic.at_mean(rate / traffic.mean_texts)
    if rate is None:
        raise typer.BadParameter(f"{kind} traffic requires a --rate")
    return generators[kind](rate).of_texts(bulk_share)


def _texts(
    checkpoint: Checkpoint,
    data: Path | None,
    mean_tokens: float,
    tail: float | None,
    hard_share: float | None,
    seed: int,
) -> Population:
    from service.simulation.texts import generate_texts, measure_texts

    if data is not None:
        from budgetformer.tables import read_texts

        rows, pairs = read_texts(data)
        inputs = rows if pairs is None else list(zip(rows, pairs, strict=True))
        population = measure_texts(checkpoint, inputs[:: math.ceil(len(inputs) / MAX_TEXTS)])
    else:
        rules = {level: checkpoint.rule(level) for level in QUALITY_NAMES}
        manifest = checkpoint.manifest
        population = generate_texts(
            rules,
            mean_tokens,
            manifest.max_tokens,
            tail,
            seed=seed,
            max_step_0_tokens=manifest.whole_tokens,
        )
    return population if hard_share is None else population.with_hard_share(hard_share)


def _figures(plan: Plan, traffic: Traffic, met: bool, core_hour: float | None) -> dict[str, Any]:
    from service.simulation.plan import price_per_million

    assert plan.run is not None
    fleet, summary = plan.run.fleet, plan.run.summary
    figures = {
        "servers": plan.servers,
        "cores": fleet.cores * fleet.servers,
        "goals_met": met,
        "texts_per_second_asked": traffic.mean_rate * traffic.mean_texts,
        "requests_per_second_of_a_server": plan.rate,
        "servers_simulated": fleet.sample,
        **asdict(summary),
        "lost_share": summary.lost_share,
    }
    if core_hour is not None:
        figures["price_of_a_million_texts"] = price_per_million(fleet, summary, core_hour)
    return figures


def _as_table(figures: dict[str, Any]) -> Table:
    table = Table("", "", show_header=False)
    levels = ", ".join(f"{name} {share:.1%}" for name, share in figures["levels"].items() if share)
    busy = ", ".join(f"{kind} {share:.0%}" for kind, share in figures["busy"].items())
    rows = {
        "servers": f"{figures['servers']:,} of {figures['cores'] // figures['servers']} cores",
        "goals met": "yes" if figures["goals_met"] else "no",
        "texts per second": f"{figures['texts_per_second']:,.0f} answered of "
        f"{figures['texts_per_second_asked']:,.0f}",
        "p50, p90, p99": ", ".join(f"{1000 * figures[p]:.1f} ms" for p in ("p50", "p90", "p99")),
        "refused, late": f"{figures['refused']:,} and {figures['expired']:,} of "
        f"{figures['sent']:,} simulated requests",
        "quality": levels,
        "busy": f"{figures['busy_cores']:.0%} of the cores ({busy})",
    }
    if (price := figures.get("price_of_a_million_texts")) is not None:
        rows["price of a million texts"] = f"{price:,.4f}"
    for name, value in rows.items():
        table.add_row(name, value)
    return table
