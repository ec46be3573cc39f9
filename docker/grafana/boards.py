"""The panels of each dashboard, by row: title, description, unit and query."""

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
    """Return half the sum of |share - calibrated share| over steps, of the last half hour."""
    by, over = "model, version, budget", "30m"
    answered, expected = (
        rate(f"{name}_total", by, VERSION, over) for name in ("items", "items_expected")
    )
    moved = f"0.5 * sum by (model, version) (abs({answered} - {expected}))"
    return share(moved, rate("items_total", "model, version", VERSION, over))


def service() -> Rows:
    latency = {f"p{q:.0%}"[:-1]: quantile(q, LATENCY, SERVING) for q in (0.5, 0.95, 0.99)}
    failed = share(rate("requests_total", where=FAILED), rate("requests_total", where=SERVING))
    return {
        "Overview": [
            stat("Requests", "Finished requests per second.", "reqps", rate("requests_total")),
            stat(
                "Failed",
                "Share of the requests that fail by a server error or a timeout.",
                "percentunit",
                f"{failed} or vector(0)",
                2,
                (0.001, 0.01),
            ),
            stat(
                "Latency p99",
                "99th percentile of the duration of requests.",
                "s",
                quantile(0.99, LATENCY, SERVING),
                2,
                (0.5, 1),
            ),
            stat(
                "Saturation",
                "Share of the time in which the device of the busiest engine computes.",
                "percentunit",
                f"max({BUSY})",
                0,
                (0.8, 0.95),
            ),
            stat(
                "Error budget burn",
                "Failure rate of the last hour, divided by the rate that the objective allows.",
                "short",
                "max(budgetformer:slo_errors:ratio1h) / 0.001 or vector(0)",
                1,
                (1, 14.4),
            ),
            stat(
                "Alerts",
                "Alerts that fire now; see the runbooks.",
                "short",
                'count(ALERTS{alertname=~"BudgetFormer.*", alertstate="firing"}) or vector(0)',
                0,
                (1, 2),
            ),
        ],
        "Requests": [
            chart(
                "Requests by outcome",
                "Finished requests per second.",
                "reqps",
                {"{{outcome}}": rate("requests_total", "outcome")},
                stacked=True,
            ),
            chart(
                "Errors",
                "Share of the classification requests that failed, by outcome.",
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
                "Rejected, by reason",
                "Rejected requests per second.",
                "reqps",
                {"{{reason}}": rate("rejected_total", "reason")},
                stacked=True,
            ),
        ],
        "Latency": [
            chart(
                "Latency", "Percentiles of the duration of requests.", "s", latency, exemplars=True
            ),
            heat_map(
                "Latency, all requests",
                "Number of requests by duration; a dot links to the trace of a request.",
                "s",
                LATENCY,
                SERVING,
                log=True,
            ),
            chart(
                "Stages",
                "Mean time that requests spend in each stage, stacked.",
                "s",
                {"{{stage}}": mean("stage_duration_seconds", "stage")},
                stacked=True,
            ),
        ],
        "Load": [
            chart(
                "Queue",
                "Age of the oldest waiting item, and estimated device time of all.",
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
                "Texts that wait for an engine, and texts that are not answered yet.",
                "short",
                {
                    "waiting, {{model}}": gauge("queue_items", "model", MODEL),
                    "in flight, {{model}}": gauge("in_flight_items", "model", MODEL),
                },
            ),
            chart(
                "Saturation",
                "Share of the time in which the device of each engine computes.",
                "percentunit",
                {"engine {{engine}}": BUSY},
            ),
            chart(
                "Quality level",
                "1 fast, 2 balanced, 3 best. Overload lowers it before requests are rejected.",
                "short",
                {
                    "current, {{model}}": gauge("quality_level", "model", MODEL, fold="min"),
                    "configured, {{model}}": gauge(
                        "quality_level_configured", "model", MODEL, fold="max"
                    ),
                },
            ),
            chart(
                "Cancelled and late requests",
                "Requests per second whose client disconnected, or whose deadline passed.",
                "reqps",
                {"cancelled": rate("cancelled_total"), "deadline": rate("deadline_exceeded_total")},
            ),
            chart(
                "Texts",
                "Answered texts per second.",
                "short",
                {"{{model}}": rate("items_total", "model", VERSION)},
                stacked=True,
            ),
            chart(
                "Answer cache",
                "Texts per second that were found, or not, in the caches of the frontends.",
                "short",
                {
                    "hits": rate("cache_hits_total", where=VERSION),
                    "misses": rate("cache_misses_total", where=VERSION),
                },
                stacked=True,
            ),
            chart(
                "Memory of the answer cache",
                "Sum over all frontends.",
                "bytes",
                {"answers": "sum(budgetformer_cache_bytes)"},
            ),
        ],
        "Jobs": [
            chart(
                "Jobs",
                "Background jobs that classify files, by status; finished jobs count for a while.",
                "short",
                {"{{status}}": gauge("jobs", "status")},
                stacked=True,
            ),
            chart(
                "Rows of jobs",
                "Classified rows per second.",
                "short",
                {"rows": rate("job_rows_total")},
            ),
        ],
        "Access": [
            chart(
                "Requests by key",
                "Finished requests per second, by name of the API key.",
                "reqps",
                {"{{key}}": f"{rate('key_requests_total', 'key')} or vector(0)"},
                stacked=True,
            ),
            chart(
                "Texts by key",
                "Requested texts per second, by name of the API key.",
                "short",
                {"{{key}}": f"{rate('key_texts_total', 'key')} or vector(0)"},
                stacked=True,
            ),
            chart(
                "Denied",
                "Requests per second without a valid key or beyond the rate of their key, and "
                "connections per second that ended before a request.",
                "reqps",
                {
                    "{{reason}}": rate("denied_total", "reason"),
                    "rate limit": rate("rejected_total", where='reason="rate"'),
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
        "Savings": [
            stat(
                "Compute saved",
                "Share of the dense network's multiply-adds that are saved.",
                "percentunit",
                f"1 - {rate('macs_total', where=VERSION)}"
                f" / ({rate('dense_macs_total', where=VERSION)} > 0) or vector(0)",
            ),
            stat(
                "Heads per text",
                "Mean number of heads computed per text, summed over layers.",
                "short",
                mean("request_heads", where=VERSION),
            ),
            stat(
                "Heads of the dense network",
                "Mean number of heads per text without budgets, summed over layers.",
                "short",
                share(
                    rate("heads_total", where=VERSION),
                    rate("request_heads_count", where=VERSION),
                ),
            ),
            stat(
                "Answered at step 0",
                "Share of the texts that were answered without attention heads.",
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
            stat(
                "Texts", "Answered texts per second.", "short", rate("items_total", where=VERSION)
            ),
        ],
        "Heads": [
            heat_map(
                "Heads per text",
                "Number of texts by heads computed, summed over layers.",
                "short",
                "request_heads",
                VERSION,
            ),
            chart(
                "Heads per text, mean",
                "Mean number of heads computed per text, summed over layers.",
                "short",
                {"{{model}}": mean("request_heads", "model", VERSION)},
            ),
            chart(
                "Compute spent",
                "Executed multiply-adds, as a share of the dense network's.",
                "percentunit",
                {"{{model}}": SAVED},
            ),
        ],
        "Steps": [
            chart(
                "Texts by step",
                "Answered texts per second, by ladder step.",
                "short",
                {"step {{budget}}": by_step},
                stacked=True,
            ),
            chart(
                "Distribution over steps",
                "Share of the texts answered at each ladder step.",
                "percentunit",
                {"step {{budget}}": f"{of_step} or 0 * {by_step}"},
                stacked=True,
            ),
            chart(
                "Answered at step 0",
                "Share of the texts that were answered without attention heads.",
                "percentunit",
                {"{{model}}": STEP_0},
            ),
            bars(
                "Steps answered, in this range",
                "Number of texts answered at each ladder step.",
                "short",
                {
                    "step {{budget}}": f"sum by (budget) (increase("
                    f"budgetformer_items_total{{{VERSION}}}[$__range]))"
                },
            ),
            bars(
                "Steps as calibrated, in this range",
                "Number of texts that calibration predicts for each ladder step.",
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
                "Mean number of texts per batch, by ladder step.",
                "short",
                {"step {{budget}}, {{model}}": mean("batch_items", "model, budget", MODEL)},
            ),
            chart(
                "Tokens per batch",
                "Mean number of tokens per batch, by ladder step.",
                "short",
                {"step {{budget}}, {{model}}": mean("batch_tokens", "model, budget", MODEL)},
            ),
            chart(
                "Padding",
                "Mean share of a batch that is padding; 0 for passes over packed tokens.",
                "percentunit",
                {"{{model}}": mean("batch_padding_ratio", "model", MODEL)},
            ),
            chart(
                "Batches",
                "Batches per second, by ladder step.",
                "short",
                {"step {{budget}}, {{model}}": rate("batches_total", "model, budget", MODEL)},
                stacked=True,
            ),
            chart(
                "Clipped int8 inputs",
                "Share of the inputs of int8 products outside their calibrated range. "
                "If it rises, recalibrate on current texts.",
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
                "Mean number of tokens per text.",
                "short",
                {"{{model}}": mean("item_tokens", "model", VERSION)},
            ),
            chart(
                "Truncated",
                "Texts per second that were longer than the window of the model.",
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
                "Engines with a heartbeat in the last five seconds.",
                "short",
                f"count({age} < {ENGINE_SILENT}) or vector(0)",
                0,
            ),
            stat(
                "Longest silence",
                "Longest time since the last heartbeat of an engine; dead engines are replaced.",
                "s",
                f"max({age})",
                1,
                (ENGINE_SILENT, 10),
            ),
            stat(
                "Engine restarts",
                "Restarts in the last 24 hours.",
                "short",
                restarts.format("1d"),
                0,
                (1, 3),
            ),
            stat(
                "Frontend restarts",
                "Restarts in the last 24 hours.",
                "short",
                starts.format("1d"),
                0,
                (1, 3),
            ),
            stat(
                "Models",
                "Number of served models.",
                "short",
                "count(count by (model) (budgetformer_model_info)) or vector(0)",
                0,
            ),
            stat(
                "Memory",
                "Resident memory of all processes; shared pages count once per process.",
                "bytes",
                "sum(budgetformer_process_resident_memory_bytes)",
            ),
        ],
        "Engines": [
            chart(
                "Heartbeat age",
                "Time since the last heartbeat of each engine.",
                "s",
                {"engine {{engine}}": gauge("engine_heartbeat_age_seconds", "engine", fold="max")},
            ),
            chart(
                "Restarts",
                "Processes that were replaced in the last five minutes.",
                "short",
                {"engines": restarts.format("5m"), "frontends": starts.format("5m")},
            ),
            chart(
                "Memory",
                "Memory of each engine, each frontend and the supervisor.",
                "bytes",
                {
                    "engine {{engine}}": gauge("device_memory_bytes", "engine", fold="max"),
                    "{{process}}": gauge("process_resident_memory_bytes", "process", own, "max"),
                },
            ),
            chart(
                "Batches",
                "Batches per second.",
                "short",
                {"{{model}}": rate("batches_total", "model", MODEL)},
            ),
            chart(
                "Processor time",
                "Processor cores in use by each process.",
                "short",
                {"{{process}}": rate("process_cpu_seconds_total", "process")},
            ),
            chart(
                "Open files",
                "Open files and connections of frontends and supervisor, and their limit.",
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
                "Sizes, device and precision of each version.",
                f"budgetformer_model_info{{{VERSION}}}",
                ("instance", "job"),
            ),
            table(
                "Program",
                "Version, commit and torch version of the server.",
                "budgetformer_build_info",
                ("job",),
            ),
            chart(
                "Loads",
                "Duration of the last load of each version, including warm-up.",
                "s",
                {"{{model}}:{{version}}": gauge("model_load_seconds", "model, version", VERSION)},
            ),
            chart(
                "Weights",
                "Memory of the weights of each version; engines share mapped pages.",
                "bytes",
                {"{{model}}:{{version}}": gauge("model_memory_bytes", "model, version", VERSION)},
            ),
            chart(
                "Texts by version",
                "Answered texts per second.",
                "short",
                {"{{model}}:{{version}}": rate("items_total", "model, version", VERSION)},
                stacked=True,
            ),
        ],
    }


def _burn(objective: str, allowed: float) -> str:
    """Return the share of requests that missed an objective, divided by the allowed share."""
    missed = f"max by (model) (budgetformer:model_slo_{objective}:ratio1h{{{MODEL}}})"
    return f"{missed} / {allowed} or 0 * {rate('model_requests_total', 'model', VERSION)}"


def _or_zero(query: str) -> str:
    """Return a query that is 0 without data, as when there is no roll-out."""
    return f"{query} or vector(0)"


def _running(gauge: str) -> str:
    return _or_zero(f"max by (model, version) (budgetformer_{gauge}{{{VERSION}}})")


def models() -> Rows:
    by, legend = "model, version", "{{model}}:{{version}}"
    steps = "Answered texts per second, by ladder step."
    return {
        "Models": [
            chart(
                "Requests by model",
                "Finished requests per second.",
                "reqps",
                {"{{model}}": rate("model_requests_total", "model", VERSION)},
                stacked=True,
            ),
            chart(
                "Errors by model",
                "Share of the requests that fail by a server error or a timeout.",
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
                "99th percentile of the duration of requests.",
                "s",
                {"{{model}}": quantile(0.99, OF_MODEL, VERSION, "model")},
            ),
            chart(
                "Failed texts",
                "Texts per second that a model failed to classify.",
                "short",
                {"{{model}}": rate("model_items_failed_total", "model", VERSION)},
            ),
            chart(
                "Error budget burn by model",
                "Failure rate of the last hour, divided by the rate that the objective allows.",
                "short",
                {"{{model}}": _burn("errors", 0.001)},
            ),
            chart(
                "Latency budget burn by model",
                "Share of slow requests in the last hour, divided by the share that is allowed.",
                "short",
                {"{{model}}": _burn("slow", 0.01)},
            ),
        ],
        "Roll-outs": [
            chart(
                "Candidates",
                "Share of the requests that a candidate answers, and share that it shadows.",
                "percentunit",
                {
                    "{{model}}:{{version}} answers": _running("rollout_weight"),
                    "{{model}}:{{version}} shadow": _running("rollout_shadow"),
                },
            ),
            chart(
                "Shadow texts",
                "Texts per second that a candidate also classified, by outcome.",
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
                "Share of the shadow texts with the same label from both versions.",
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
                "Cost of the candidate, divided by the cost of the served version.",
                "short",
                {
                    f"{legend} {cost}": _or_zero(
                        share(
                            rate(f"shadow_{metric}_total", by, f'{VERSION}, side="candidate"'),
                            rate(f"shadow_{metric}_total", by, f'{VERSION}, side="served"'),
                        )
                    )
                    for cost, metric in (("multiply-adds", "macs"), ("time", "seconds"))
                },
            ),
        ],
        "Two versions compared": [
            chart(
                "Requests of each version",
                "Finished requests per second.",
                "reqps",
                {legend: rate("model_requests_total", by, COMPARED)},
            ),
            chart(
                "Latency p50 of each version",
                "Median duration of requests.",
                "s",
                {legend: quantile(0.5, OF_MODEL, COMPARED, by)},
            ),
            chart(
                "Latency p99 of each version",
                "99th percentile of the duration of requests.",
                "s",
                {legend: quantile(0.99, OF_MODEL, COMPARED, by)},
            ),
            chart(
                "Errors of each version",
                "Share of the requests that fail by a server error or a timeout.",
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
                "Mean number of heads computed per text, summed over layers.",
                "short",
                {legend: mean("request_heads", by, COMPARED)},
            ),
            chart(
                "Multiply-adds per text of each version",
                "Mean number of multiply-adds executed per text.",
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
    """Return one text panel per section of the runbooks."""
    _, *sections = re.split(r"^## ", markdown, flags=re.MULTILINE)
    return [
        text(title, body.strip())
        for title, body in (section.split("\n", maxsplit=1) for section in sections)
    ]
