"""What the dashboards show: rows of panels, each with its question and its query."""

from __future__ import annotations

import re

from panels import (
    COMPARED,
    FIRST,
    MODEL,
    SECOND,
    SERVING,
    VERSION,
    Panel,
    bars,
    chart,
    gauge,
    heat_map,
    mean,
    quantile,
    rate,
    share,
    stat,
    table,
    text,
)

Rows = dict[str, list[Panel]]

LATENCY = "request_duration_seconds"
OF_MODEL = "model_request_duration_seconds"
FAILURES = 'outcome=~"error|timeout"'
FAILED = f"{SERVING}, {FAILURES}"
ENGINE_SILENT = 5
"""Seconds after which an engine does not count as alive."""

BUSY = rate("device_busy_seconds_total", "engine")
SAVED = share(rate("macs_total", "model", VERSION), rate("dense_macs_total", "model", VERSION))
STEP_0 = share(
    rate("items_total", "model", f'{VERSION}, budget="0"'), rate("items_total", "model", VERSION)
)


def _drift() -> str:
    """Compare the steps that texts got with those that calibration gave, over half an hour."""
    by, over = "model, version, budget", "30m"
    answered, expected = (
        rate(f"{name}_total", by, VERSION, over) for name in ("items", "items_expected")
    )
    apart = f"0.5 * sum by (model, version) (abs({answered} - {expected}))"
    return share(apart, rate("items_total", "model, version", VERSION, over))


def service() -> Rows:
    latency = {f"p{q:.0%}"[:-1]: quantile(q, LATENCY, SERVING) for q in (0.5, 0.95, 0.99)}
    failed = share(rate("requests_total", where=FAILED), rate("requests_total", where=SERVING))
    return {
        "Overview": [
            stat("Requests", "Finished per second.", "reqps", rate("requests_total")),
            stat(
                "Failed",
                "Share of the requests that end in an error of the service or past their deadline.",
                "percentunit",
                f"{failed} or vector(0)",
                2,
                (0.001, 0.01),
            ),
            stat(
                "Latency p99",
                "Of whole requests.",
                "s",
                quantile(0.99, LATENCY, SERVING),
                2,
                (0.5, 1),
            ),
            stat(
                "Saturation",
                "Share of the time that the busiest engine's device computes.",
                "percentunit",
                f"max({BUSY})",
                0,
                (0.8, 0.95),
            ),
            stat(
                "Error budget burn",
                "1: the failures of the last hour, kept up, use exactly what the objective allows.",
                "short",
                "max(budgetformer:slo_errors:ratio1h) / 0.001 or vector(0)",
                1,
                (1, 14.4),
            ),
            stat(
                "Alerts",
                "Firing now; the runbooks say what to do.",
                "short",
                'count(ALERTS{alertname=~"BudgetFormer.*", alertstate="firing"}) or vector(0)',
                0,
                (1, 2),
            ),
        ],
        "Requests": [
            chart(
                "Requests by outcome",
                "Finished per second.",
                "reqps",
                {"{{outcome}}": rate("requests_total", "outcome")},
                stacked=True,
            ),
            chart(
                "Errors",
                "Share of the requests that classify, by how they failed.",
                "percentunit",
                {
                    outcome: share(
                        rate("requests_total", where=f'{SERVING}, outcome="{outcome}"'),
                        rate("requests_total", where=SERVING),
                    )
                    for outcome in ("error", "timeout", "rejected", "cancelled")
                },
            ),
            chart(
                "Refused, by reason",
                "Requests per second that were turned away.",
                "reqps",
                {"{{reason}}": rate("rejected_total", "reason")},
                stacked=True,
            ),
        ],
        "Latency": [
            chart("Latency", "Of whole requests.", "s", latency, exemplars=True),
            heat_map(
                "Latency, all requests",
                "How many requests took how long; a dot leads to the trace of one.",
                "s",
                LATENCY,
                SERVING,
                log=True,
            ),
            chart(
                "Stages",
                "Where a request spends its time: the mean of each stage, stacked.",
                "s",
                {"{{stage}}": mean("stage_duration_seconds", "stage")},
                stacked=True,
            ),
        ],
        "Load": [
            chart(
                "Queue",
                "The longest wait at this moment, and the device time of all that waits.",
                "s",
                {
                    "oldest, {{model}}": gauge(
                        "queue_oldest_age_seconds", "model", MODEL, fold="max"
                    ),
                    "device time, {{model}}": gauge("queue_cost_seconds", "model", MODEL),
                },
            ),
            chart(
                "Items",
                "Texts that wait for an engine, and texts without an answer yet.",
                "short",
                {
                    "waiting, {{model}}": gauge("queue_items", "model", MODEL),
                    "in flight, {{model}}": gauge("in_flight_items", "model", MODEL),
                },
            ),
            chart(
                "Saturation",
                "Share of the time that each engine's device computes.",
                "percentunit",
                {"engine {{engine}}": BUSY},
            ),
            chart(
                "Quality level",
                "1 fast, 2 balanced, 3 best. Overload lowers it before anything is refused.",
                "short",
                {
                    "in force, {{model}}": gauge("quality_level", "model", MODEL, fold="min"),
                    "configured, {{model}}": gauge(
                        "quality_level_configured", "model", MODEL, fold="max"
                    ),
                },
            ),
            chart(
                "Given up",
                "Requests per second whose client left, and whose deadline passed.",
                "reqps",
                {"cancelled": rate("cancelled_total"), "deadline": rate("deadline_exceeded_total")},
            ),
            chart(
                "Texts",
                "Answered per second.",
                "short",
                {"{{model}}": rate("items_total", "model", VERSION)},
                stacked=True,
            ),
            chart(
                "Answers kept",
                "Texts per second that were looked for among the answers that frontends keep, and "
                "those that were found.",
                "short",
                {
                    "found": rate("cache_hits_total", where=VERSION),
                    "not found": rate("cache_misses_total", where=VERSION),
                },
                stacked=True,
            ),
            chart(
                "Memory of answers kept",
                "Of all frontends together.",
                "bytes",
                {"answers": "sum(budgetformer_cache_bytes)"},
            ),
        ],
        "Jobs": [
            chart(
                "Jobs",
                "Files that are classified in the background, by status; those that have ended are "
                "kept for a while.",
                "short",
                {"{{status}}": gauge("jobs", "status")},
                stacked=True,
            ),
            chart(
                "Rows of jobs", "Answered per second.", "short", {"rows": rate("job_rows_total")}
            ),
        ],
        "Access": [
            chart(
                "Requests by key",
                "Finished per second, by the name of the caller's key.",
                "reqps",
                {"{{key}}": f"{rate('key_requests_total', 'key')} or vector(0)"},
                stacked=True,
            ),
            chart(
                "Texts by key",
                "Asked for per second, by the name of the caller's key.",
                "short",
                {"{{key}}": f"{rate('key_texts_total', 'key')} or vector(0)"},
                stacked=True,
            ),
            chart(
                "Turned away",
                "Requests per second without a key that is good for them, requests beyond a key's "
                "rate, and connections that ended before there was a request.",
                "reqps",
                {
                    "{{reason}}": rate("denied_total", "reason"),
                    "beyond the rate": rate("rejected_total", where='reason="rate"'),
                    "broken, {{reason}}": rate("broken_connections_total", "reason"),
                },
                stacked=True,
            ),
        ],
    }


def budgets() -> Rows:
    by_step = rate("items_total", "budget", VERSION)
    of_step = f"{by_step} / on () group_left () ({rate('items_total', where=VERSION)} > 0)"
    return {
        "What budgets save": [
            stat(
                "Compute saved",
                "Multiply-adds not spent, against the dense network.",
                "percentunit",
                f"1 - {rate('macs_total', where=VERSION)}"
                f" / ({rate('dense_macs_total', where=VERSION)} > 0) or vector(0)",
            ),
            stat(
                "Heads per text",
                "Mean number of heads that were computed, summed over layers.",
                "short",
                mean("request_heads", where=VERSION),
            ),
            stat(
                "Heads of the dense network",
                "Mean over what was answered.",
                "short",
                share(
                    rate("heads_total", where=VERSION),
                    rate("request_heads_count", where=VERSION),
                ),
            ),
            stat(
                "Answered at step 0",
                "Share of the texts that no head was computed for.",
                "percentunit",
                share(
                    rate("items_total", where=f'{VERSION}, budget="0"'),
                    rate("items_total", where=VERSION),
                )
                + " or vector(0)",
            ),
            stat(
                "Drift",
                "Share of the texts that would have to change their step to match calibration.",
                "percentunit",
                f"max({_drift()}) or vector(0)",
                1,
                (0.1, 0.15),
            ),
            stat("Texts", "Answered per second.", "short", rate("items_total", where=VERSION)),
        ],
        "Heads": [
            heat_map(
                "Heads per text",
                "How many texts took how many heads, summed over layers.",
                "short",
                "request_heads",
                VERSION,
            ),
            chart(
                "Heads per text, mean",
                "Summed over layers.",
                "short",
                {"{{model}}": mean("request_heads", "model", VERSION)},
            ),
            chart(
                "Compute spent",
                "Multiply-adds executed, as a share of the dense network's.",
                "percentunit",
                {"{{model}}": SAVED},
            ),
        ],
        "Steps": [
            chart(
                "Texts by step",
                "Per second, by the ladder step that answered them.",
                "short",
                {"step {{budget}}": by_step},
                stacked=True,
            ),
            chart(
                "Distribution over steps",
                "Share of the texts that each ladder step answered.",
                "percentunit",
                {"step {{budget}}": f"{of_step} or 0 * {by_step}"},
                stacked=True,
            ),
            chart(
                "Answered at step 0",
                "Share of the texts that no head was computed for.",
                "percentunit",
                {"{{model}}": STEP_0},
            ),
            bars(
                "Steps answered, in this range",
                "Texts by the ladder step that answered them.",
                "short",
                {
                    "step {{budget}}": f"sum by (budget) (increase("
                    f"budgetformer_items_total{{{VERSION}}}[$__range]))"
                },
            ),
            bars(
                "Steps as calibrated, in this range",
                "Where calibration would have answered the same number of texts.",
                "short",
                {
                    "step {{budget}}": f"sum by (budget) (increase("
                    f"budgetformer_items_expected_total{{{VERSION}}}[$__range]))"
                },
            ),
            chart(
                "Drift",
                "Share of the texts that would have to change their step to match calibration, "
                "over half an hour.",
                "percentunit",
                {"{{model}}:{{version}}": _drift()},
            ),
        ],
        "Batches and texts": [
            chart(
                "Texts per batch",
                "Mean, by ladder step.",
                "short",
                {"step {{budget}}, {{model}}": mean("batch_items", "model, budget", MODEL)},
            ),
            chart(
                "Tokens per batch",
                "Mean, by ladder step.",
                "short",
                {"step {{budget}}, {{model}}": mean("batch_tokens", "model, budget", MODEL)},
            ),
            chart(
                "Padding",
                "Mean share of a batch that is padding. Passes over packed tokens have none, "
                "whatever the budget.",
                "percentunit",
                {"{{model}}": mean("batch_padding_ratio", "model", MODEL)},
            ),
            chart(
                "Batches",
                "Computed per second, by ladder step.",
                "short",
                {"step {{budget}}, {{model}}": rate("batches_total", "model, budget", MODEL)},
                stacked=True,
            ),
            chart(
                "Clipped int8 inputs",
                "Share of the inputs of int8 products outside their calibrated range. "
                "When it rises, recalibrate on current texts.",
                "percentunit",
                {
                    "{{model}}:{{version}}": share(
                        rate("int8_states_clipped_total", "model, version", VERSION),
                        rate("int8_states_checked_total", "model, version", VERSION),
                    )
                },
            ),
            chart(
                "Tokens per text",
                "Mean length.",
                "short",
                {"{{model}}": mean("item_tokens", "model", VERSION)},
            ),
            chart(
                "Truncated",
                "Texts per second that were longer than the model reads.",
                "short",
                {"truncated": rate("truncated_total")},
            ),
        ],
    }


def engines() -> Rows:
    age = "budgetformer_engine_heartbeat_age_seconds"
    restarts = "sum(increase(budgetformer_engine_restarts_total[{}]))"
    frontend = 'process=~"frontend-.*"'
    own = 'process!~"engine-.*"'
    changes = f"changes(budgetformer_process_start_time_seconds{{{{{frontend}}}}}[{{}}])"
    starts = f"sum({changes}) or vector(0)"
    return {
        "Overview": [
            stat(
                "Engines alive",
                "Heard of within five seconds.",
                "short",
                f"count({age} < {ENGINE_SILENT}) or vector(0)",
                0,
            ),
            stat(
                "Longest silence",
                "Of any engine; the supervisor replaces dead ones within seconds.",
                "s",
                f"max({age})",
                1,
                (ENGINE_SILENT, 10),
            ),
            stat(
                "Engine restarts",
                "Since yesterday.",
                "short",
                restarts.format("1d"),
                0,
                (1, 3),
            ),
            stat("Frontend restarts", "Since yesterday.", "short", starts.format("1d"), 0, (1, 3)),
            stat(
                "Models",
                "Served now.",
                "short",
                "count(count by (model) (budgetformer_model_info)) or vector(0)",
                0,
            ),
            stat(
                "Memory",
                "Of all processes together, in which pages that they share count for each.",
                "bytes",
                "sum(budgetformer_process_resident_memory_bytes)",
            ),
        ],
        "Engines": [
            chart(
                "Heartbeat age",
                "Time since each engine was last heard of.",
                "s",
                {"engine {{engine}}": gauge("engine_heartbeat_age_seconds", "engine", fold="max")},
            ),
            chart(
                "Restarts",
                "Processes that were replaced, in five minutes.",
                "short",
                {"engines": restarts.format("5m"), "fronts": starts.format("5m")},
            ),
            chart(
                "Memory",
                "Of each engine, each frontend and the supervisor.",
                "bytes",
                {
                    "engine {{engine}}": gauge("device_memory_bytes", "engine", fold="max"),
                    "{{process}}": gauge("process_resident_memory_bytes", "process", own, "max"),
                },
            ),
            chart(
                "Batches",
                "Computed per second.",
                "short",
                {"{{model}}": rate("batches_total", "model", MODEL)},
            ),
            chart(
                "Processor time",
                "Cores that each process uses.",
                "short",
                {"{{process}}": rate("process_cpu_seconds_total", "process")},
            ),
            chart(
                "Open files",
                "Connections and files that frontends and supervisor hold, and how many each may.",
                "short",
                {
                    "{{process}}": gauge("process_open_fds", "process", own, "max"),
                    "limit": "min(budgetformer_process_max_fds)",
                },
            ),
        ],
        "Models": [
            table(
                "Versions served",
                "Sizes, device and precision of each.",
                f"budgetformer_model_info{{{VERSION}}}",
                ("instance", "job"),
            ),
            table(
                "Program",
                "Its version, commit and torch.",
                "budgetformer_build_info",
                ("job",),
            ),
            chart(
                "Loads",
                "Time that the last load of each version took, warm-up included.",
                "s",
                {"{{model}}:{{version}}": gauge("model_load_seconds", "model, version", VERSION)},
            ),
            chart(
                "Weights",
                "Memory of each version's weights; engines share the pages that they map.",
                "bytes",
                {"{{model}}:{{version}}": gauge("model_memory_bytes", "model, version", VERSION)},
            ),
            chart(
                "Texts by version",
                "Answered per second.",
                "short",
                {"{{model}}:{{version}}": rate("items_total", "model, version", VERSION)},
                stacked=True,
            ),
        ],
    }


def _burn(objective: str, allowed: float) -> str:
    """Divide the share of the last hour's requests that missed an objective by what it allows."""
    missed = f"max by (model) (budgetformer:model_slo_{objective}:ratio1h{{{MODEL}}})"
    return f"{missed} / {allowed} or 0 * {rate('model_requests_total', 'model', VERSION)}"


def _or_zero(query: str) -> str:
    """Show 0 while there is no roll-out."""
    return f"{query} or vector(0)"


def _running(gauge: str) -> str:
    return _or_zero(f"max by (model, version) (budgetformer_{gauge}{{{VERSION}}})")


def models() -> Rows:
    by, legend = "model, version", "{{model}}:{{version}}"
    steps = "Texts per second, by the ladder step that answered them."
    return {
        "Models": [
            chart(
                "Requests by model",
                "Finished per second.",
                "reqps",
                {"{{model}}": rate("model_requests_total", "model", VERSION)},
                stacked=True,
            ),
            chart(
                "Errors by model",
                "Share of the requests that end in an error of the service or past their deadline.",
                "percentunit",
                {
                    "{{model}}": share(
                        rate("model_requests_total", "model", f"{VERSION}, {FAILURES}"),
                        rate("model_requests_total", "model", VERSION),
                    )
                },
            ),
            chart(
                "Latency p99 by model",
                "Of whole requests.",
                "s",
                {"{{model}}": quantile(0.99, OF_MODEL, VERSION, "model")},
            ),
            chart(
                "Failed texts",
                "Texts per second that a model failed to answer.",
                "short",
                {"{{model}}": rate("model_items_failed_total", "model", VERSION)},
            ),
            chart(
                "Error budget burn by model",
                "1: the failures of the last hour, kept up, use exactly what the objective allows.",
                "short",
                {"{{model}}": _burn("errors", 0.001)},
            ),
            chart(
                "Latency budget burn by model",
                "1: as many requests of the last hour were slow as the objective allows.",
                "short",
                {"{{model}}": _burn("slow", 0.01)},
            ),
        ],
        "Roll-outs": [
            chart(
                "Candidates",
                "Share of requests that a candidate answers, and of others that it computes too.",
                "percentunit",
                {
                    "{{model}}:{{version}} answers": _running("rollout_weight"),
                    "{{model}}:{{version}} shadow": _running("rollout_shadow"),
                },
            ),
            chart(
                "Shadow texts",
                "Texts per second that a candidate computed beside the served version, by outcome.",
                "short",
                {
                    "{{model}}:{{version}} {{outcome}}": _or_zero(
                        rate("shadow_items_total", f"{by}, outcome", VERSION)
                    )
                },
                stacked=True,
            ),
            chart(
                "Agreement of shadow texts",
                "Share of the texts to which both versions give the same label.",
                "percentunit",
                {
                    legend: _or_zero(
                        share(
                            rate("shadow_items_total", by, f'{VERSION}, outcome="agreed"'),
                            rate(
                                "shadow_items_total", by, f'{VERSION}, outcome=~"agreed|differed"'
                            ),
                        )
                    )
                },
            ),
            chart(
                "Cost of shadow texts",
                "The candidate's, divided by the served version's.",
                "short",
                {
                    f"{legend} {what}": _or_zero(
                        share(
                            rate(f"shadow_{metric}_total", by, f'{VERSION}, side="candidate"'),
                            rate(f"shadow_{metric}_total", by, f'{VERSION}, side="served"'),
                        )
                    )
                    for what, metric in (("multiply-adds", "macs"), ("time", "seconds"))
                },
            ),
        ],
        "Two versions compared": [
            chart(
                "Requests of each version",
                "Finished per second.",
                "reqps",
                {legend: rate("model_requests_total", by, COMPARED)},
            ),
            chart(
                "Latency p50 of each version",
                "Of whole requests.",
                "s",
                {legend: quantile(0.5, OF_MODEL, COMPARED, by)},
            ),
            chart(
                "Latency p99 of each version",
                "Of whole requests.",
                "s",
                {legend: quantile(0.99, OF_MODEL, COMPARED, by)},
            ),
            chart(
                "Errors of each version",
                "Share of the requests that end in an error of the service or past their deadline.",
                "percentunit",
                {
                    legend: share(
                        rate("model_requests_total", by, f"{COMPARED}, {FAILURES}"),
                        rate("model_requests_total", by, COMPARED),
                    )
                },
            ),
            chart(
                "Heads per text of each version",
                "Mean, summed over layers.",
                "short",
                {legend: mean("request_heads", by, COMPARED)},
            ),
            chart(
                "Multiply-adds per text of each version",
                "Mean of what was executed.",
                "short",
                {
                    legend: share(
                        rate("macs_total", by, COMPARED),
                        rate("request_heads_count", by, COMPARED),
                    )
                },
            ),
            chart(
                "Texts by step, first version",
                steps,
                "short",
                {"step {{budget}}": rate("items_total", "budget", FIRST)},
                stacked=True,
            ),
            chart(
                "Texts by step, second version",
                steps,
                "short",
                {"step {{budget}}": rate("items_total", "budget", SECOND)},
                stacked=True,
            ),
        ],
    }


def runbooks(markdown: str) -> list[Panel]:
    """Make a panel of each section of the runbooks."""
    _, *sections = re.split(r"^## ", markdown, flags=re.MULTILINE)
    return [
        text(title, body.strip())
        for title, body in (section.split("\n", maxsplit=1) for section in sections)
    ]
