"""Write the Grafana dashboard of the service: `python docker/grafana/generate.py`.

The queries live here, each once; `dashboards/service.json` is only what Grafana reads.
An idle service shows 0 rather than "No data": a rate is 0 then by itself, and what divides by one
falls back through `or`.
"""

from __future__ import annotations

from pathlib import Path

from grafana_foundation_sdk.builders.common import (
    ReduceDataOptions,
    StackingConfig,
    VizLegendOptions,
    VizTooltipOptions,
)
from grafana_foundation_sdk.builders.dashboard import Dashboard, QueryVariable, Row
from grafana_foundation_sdk.builders.prometheus import Dataquery
from grafana_foundation_sdk.builders.stat import Panel as Stat
from grafana_foundation_sdk.builders.timeseries import Panel as Timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.common import (
    BigValueGraphMode,
    DataSourceRef,
    LegendDisplayMode,
    LegendPlacement,
    SortOrder,
    StackingMode,
    TooltipDisplayMode,
)
from grafana_foundation_sdk.models.dashboard import (
    DashboardCursorSync,
    VariableOption,
    VariableRefresh,
    VariableSort,
)

OUTPUT = Path(__file__).parent / "dashboards" / "service.json"
DATASOURCE = DataSourceRef(type_val="prometheus", uid="prometheus")
WINDOW = "$__rate_interval"
LATENCY = "request_duration_seconds"
MODEL = 'model=~"$model"'
ERROR = 'outcome="error"'

Queries = dict[str, str]  # legend -> PromQL


def rate(metric: str, by: str = "", where: str = "") -> str:
    grouped = f"sum by ({by})" if by else "sum"
    selected = f"{{{where}}}" if where else ""
    return f"{grouped} (rate(budgetformer_{metric}{selected}[{WINDOW}]))"


def ratio(part: str, whole: str, by: str = "", where: str = "") -> str:
    """Divide two rates; where nothing happens, 0 under the same labels."""
    whole = rate(whole, by, where)
    return f"{rate(part, by, where)} / ({whole} > 0) or {whole}"


def mean(histogram: str, by: str = "", where: str = "") -> str:
    return ratio(f"{histogram}_sum", f"{histogram}_count", by, where)


def quantile(q: float, histogram: str, by: str = "", where: str = "") -> str:
    """Read a quantile off a histogram; where nothing was observed, 0 under the same labels."""
    buckets = rate(f"{histogram}_bucket", f"le, {by}" if by else "le", where)
    return f"histogram_quantile({q}, {buckets}) >= 0 or {rate(f'{histogram}_count', by, where)}"


def with_queries(panel: Stat | Timeseries, queries: Queries) -> Stat | Timeseries:
    for number, (legend, expression) in enumerate(queries.items()):
        query = Dataquery().ref_id(chr(ord("A") + number)).expr(expression).legend_format(legend)
        panel.with_target(query.datasource(DATASOURCE).range())
    return panel.datasource(DATASOURCE)


def stat(title: str, description: str, unit: str, queries: Queries, decimals: int = 1) -> Stat:
    panel = Stat().title(title).description(description).unit(unit).decimals(decimals)
    panel.graph_mode(BigValueGraphMode.AREA).span(4).height(4)
    panel.reduce_options(ReduceDataOptions().calcs(["lastNotNull"]))
    return with_queries(panel, queries)


def chart(
    title: str, description: str, unit: str, queries: Queries, *, stacked: bool = False
) -> Timeseries:
    panel = Timeseries().title(title).description(description).unit(unit)
    panel.min(0).line_width(1).fill_opacity(30 if stacked else 8).span(8).height(8)
    panel.tooltip(VizTooltipOptions().mode(TooltipDisplayMode.MULTI).sort(SortOrder.DESCENDING))
    panel.legend(
        VizLegendOptions()
        .display_mode(LegendDisplayMode.LIST)
        .placement(LegendPlacement.BOTTOM)
        .show_legend(True)
    )
    if stacked:
        panel.stacking(StackingConfig().mode(StackingMode.NORMAL).group("all"))
    return with_queries(panel, queries)


def model_variable() -> QueryVariable:
    variable = QueryVariable("model").label("Model").datasource(DATASOURCE)
    variable.query("label_values(budgetformer_model_info, model)")
    variable.refresh(VariableRefresh.ON_TIME_RANGE_CHANGED).sort(VariableSort.ALPHABETICAL_ASC)
    variable.multi(True).include_all(True).all_value(".*")
    return variable.current(VariableOption(selected=True, text="All", value="$__all"))


def overview() -> list[Stat]:
    saved = (
        f"1 - {rate('macs_total', where=MODEL)}"
        f" / ({rate('dense_macs_total', where=MODEL)} > 0) or vector(0)"
    )
    failed = f"{rate('requests_total', where=ERROR)} / ({rate('requests_total')} > 0) or vector(0)"
    return [
        stat("Requests", "Finished per second.", "reqps", {"": rate("requests_total")}),
        stat("Latency p99", "Of whole requests.", "s", {"": quantile(0.99, LATENCY)}, 2),
        stat("Failed", "Share that ended in an error of the service.", "percentunit", {"": failed}),
        stat(
            "Compute saved",
            "Multiply-adds not spent, against the dense network.",
            "percentunit",
            {"": saved},
        ),
        stat(
            "Heads per item",
            "Mean number of heads that were computed.",
            "short",
            {"": mean("request_heads", where=MODEL)},
        ),
        stat(
            "Engine restarts",
            "Since yesterday.",
            "short",
            {"": "sum(increase(budgetformer_engine_restarts_total[1d])) or vector(0)"},
            0,
        ),
    ]


def requests() -> list[Timeseries]:
    latency = {f"p{q:.0%}"[:-1]: quantile(q, LATENCY) for q in (0.5, 0.95, 0.99)}
    return [
        chart(
            "Requests by outcome",
            "Finished per second.",
            "reqps",
            {"{{outcome}}": rate("requests_total", "outcome")},
            stacked=True,
        ),
        chart("Latency", "Of whole requests, refused ones included.", "s", latency),
        chart(
            "Stages, p95",
            "Where a request spends its time.",
            "s",
            {"{{stage}}": quantile(0.95, "stage_duration_seconds", "stage")},
        ),
        chart(
            "Refused, by reason",
            "Requests per second that admission turned away.",
            "reqps",
            {"{{reason}}": rate("rejected_total", "reason")},
            stacked=True,
        ),
        chart(
            "Given up",
            "Requests per second whose client left, and whose deadline passed.",
            "reqps",
            {"cancelled": rate("cancelled_total"), "deadline": rate("deadline_exceeded_total")},
        ),
        chart(
            "Items",
            "Texts that wait for an engine, and texts without an answer yet.",
            "short",
            {
                "waiting, {{model}}": f"sum by (model) (budgetformer_queue_items{{{MODEL}}})",
                "in flight, {{model}}": f"sum by (model) (budgetformer_in_flight_items{{{MODEL}}})",
            },
        ),
    ]


def budgets() -> list[Timeseries]:
    saved = ratio("macs_total", "dense_macs_total", "model", MODEL)
    return [
        chart(
            "Items by budget",
            "Texts per second, by the ladder step that answered them.",
            "short",
            {"step {{budget}}, {{model}}": rate("items_total", "model, budget", MODEL)},
            stacked=True,
        ),
        chart(
            "Heads per item",
            "Mean number of heads that were computed, summed over layers.",
            "short",
            {"{{model}}": mean("request_heads", "model", MODEL)},
        ),
        chart(
            "Compute spent",
            "Multiply-adds executed, as a share of the dense network's.",
            "percentunit",
            {"{{model}}": saved},
        ),
        chart(
            "Quality level",
            "The level in force; overload lowers it before anything is refused.",
            "short",
            {"{{model}}": f"min by (model) (budgetformer_quality_level{{{MODEL}}})"},
        ),
        chart(
            "Tokens per item",
            "Mean length of a text.",
            "short",
            {"{{model}}": mean("item_tokens", "model", MODEL)},
        ),
        chart(
            "Truncated",
            "Texts per second that were longer than the model reads.",
            "short",
            {"truncated": rate("truncated_total")},
        ),
    ]


def engines() -> list[Timeseries]:
    oldest = f"max by (model) (budgetformer_queue_oldest_age_seconds{{{MODEL}}})"
    cost = f"sum by (model) (budgetformer_queue_cost_seconds{{{MODEL}}})"
    return [
        chart(
            "Items per batch",
            "Mean, by ladder step.",
            "short",
            {"step {{budget}}, {{model}}": mean("batch_items", "model, budget", MODEL)},
        ),
        chart(
            "Batches",
            "Computed per second.",
            "short",
            {"{{model}}": rate("batches_total", "model", MODEL)},
        ),
        chart(
            "Queue",
            "The longest wait at this moment, and the device time of all that waits.",
            "s",
            {"oldest, {{model}}": oldest, "cost, {{model}}": cost},
        ),
        chart(
            "Heartbeat age",
            "Time since each engine was last heard of.",
            "s",
            {"engine {{engine}}": "max by (engine) (budgetformer_engine_heartbeat_age_seconds)"},
        ),
        chart(
            "Restarts",
            "Engines that were replaced, per minute.",
            "short",
            {"restarts": f"60 * {rate('engine_restarts_total')} or vector(0)"},
        ),
        chart(
            "Memory",
            "Of each engine's device.",
            "bytes",
            {"engine {{engine}}": "max by (engine) (budgetformer_device_memory_bytes)"},
        ),
    ]


def build() -> Dashboard:
    dashboard = Dashboard("BudgetFormer Serving").uid("budgetformer-service").tags(["budgetformer"])
    dashboard.description("What the service answers, how fast, and what it saves doing so.")
    dashboard.readonly().refresh("10s").time("now-30m", "now").timezone("browser")
    dashboard.tooltip(DashboardCursorSync.CROSSHAIR).with_variable(model_variable())
    for title, panels in {
        "Overview": overview(),
        "Requests": requests(),
        "Budgets": budgets(),
        "Engines": engines(),
    }.items():
        dashboard.with_row(Row(title))
        for panel in panels:
            dashboard.with_panel(panel)
    return dashboard


def render() -> str:
    dashboard = build().build()
    for number, panel in enumerate(dashboard.panels or [], start=1):
        panel.id_val = number
    return JSONEncoder(sort_keys=True, indent=2).encode(dashboard) + "\n"


if __name__ == "__main__":
    OUTPUT.write_text(render(), encoding="utf-8")
