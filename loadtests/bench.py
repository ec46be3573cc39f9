"""Check all performance targets, and print them on one screen: pass or short.

    python loadtests/bench.py [--quick] [--data ag_news/test.parquet] [--repeats 3]

It runs, one after the other, `budgetformer bench pass`, the idle service with two models, and the
comparison with other servers (compare.py; the report goes to build/compare). `--quick` takes less
than three minutes, with fewer texts, rounds and baselines, so its figures vary more. All figures
are written to build/bench.json. A missed target does not make the program fail; unanswered requests
and wrong answers do.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from loadtests.compare import (
    PROMISE_HEADS,
    Plan,
    Repeats,
    machine,
    repeat,
    report,
    service_promises,
)
from loadtests.contenders import CONTENDERS, FLOOR, ONNX_INT8, OURS, PIPELINE
from loadtests.openloop import limit_lines
from loadtests.promises import Promise, pass_promises
from loadtests.servers import ours, run_quietly
from loadtests.texts import texts_of

BUILD = Path("build")
QUICK_CONTENDERS = (ONNX_INT8, PIPELINE, FLOOR)
IDLE_SECONDS = 5.0
"""Time for which the idle server is measured, after its start-up work is done."""


def time_pass(data: Path | None, quick: bool) -> dict[str, Any]:
    """Return the report of `budgetformer bench pass`."""
    folder = BUILD / "bench" / "pass"
    if data is None:
        data = BUILD / "bench" / "texts.jsonl"
        data.parent.mkdir(parents=True, exist_ok=True)
        data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts_of(None, 600)))
    program = [
        sys.executable, "-m", "service.cli", "bench", "pass", "--model=ag_news", "--json",
        f"--data={data}", f"--out={folder}", *(["--batch=1", "--batch=32", "--rounds=2"] * quick),
    ]  # fmt: skip
    run_quietly(program)
    report: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return report


def idle_promises() -> list[Promise]:
    """Measure the processor time, memory and start-up time of a server with two idle models."""
    cores = sorted(os.sched_getaffinity(0))
    with ours(cores, "--models=ag_news", "--models=imdb") as server:
        busy = server.at_rest(IDLE_SECONDS)
        return [
            Promise("idle, two models: % of a core", "<=", 1, [100 * busy]),
            Promise("idle, two models: MiB", "<=", 600, [server.memory()]),
            Promise("start-up, two models: seconds", "<=", 15, [server.start_seconds]),
        ]


def table_of(promises: list[Promise], facts: dict[str, str], real: bool, seconds: float) -> Table:
    """Return the table; without real texts (`real`), targets that require them get no verdict."""
    caption = f"{facts['processor']}; {facts['cores']}. {facts['texts']}. {seconds:.0f} s."
    table = Table(*PROMISE_HEADS, caption=caption, box=box.SIMPLE_HEAD)
    for promise in promises:
        judged = real or not promise.needs_real_texts
        color = {"pass": "green", "short": "yellow"}[promise.verdict] if judged else "dim"
        verdict = promise.verdict if judged else "needs --data"
        table.add_row(*promise.row[:-1], f"[{color}]{verdict}")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--data", type=Path, help="labelled texts (Parquet) beside a labels.json")
    parser.add_argument("--checkpoint", type=Path, default=Path("model_store/ag_news/3"))
    parser.add_argument("--before", type=Path, help="another checkout to compare with")
    parser.add_argument("--repeats", type=int, default=1, help="repeats of the comparison")
    given = parser.parse_args()
    began = time.monotonic()
    promises = pass_promises(time_pass(given.data, given.quick)) + idle_promises()
    plan = Plan.of(given.checkpoint, given.data, seconds=2.0 if given.quick else 5.0)
    levels = ["balanced"] if given.quick else list(OURS)
    baselines = QUICK_CONTENDERS if given.quick else CONTENDERS
    facts = machine(plan, given.data)
    client = [] if given.quick else limit_lines(300, [500, 2000, 5000], 2.0)
    plan.cores.hold_client()
    stored: list[dict[str, Any]] = []
    for _ in range(given.repeats):
        measured, absent = repeat(plan, levels, baselines, given.before)
        stored.append(
            {"machine": facts, "absent": absent, "measured": [asdict(m) for m in measured]}
        )
    repeats = Repeats(stored)
    if not given.quick:
        folder = BUILD / "compare"
        folder.mkdir(parents=True, exist_ok=True)
        report(folder, stored, client)
    promises += service_promises(repeats)
    broken = repeats.broken()
    figures = {
        "machine": facts, "quick": given.quick, "broken": broken, "repeats": stored,
        "promises": [promise.as_dict() for promise in promises],
    }  # fmt: skip
    (BUILD / "bench.json").write_text(json.dumps(figures, indent=1) + "\n")
    seconds = time.monotonic() - began
    console = Console(width=max(120, Console().width))
    console.print(table_of(promises, facts, given.data is not None, seconds))
    for baseline, reason in stored[-1]["absent"].items():
        print(f"not measured: {baseline} ({reason})")
    if broken:
        raise SystemExit("\n".join(["unanswered requests or wrong answers:", *broken]))


if __name__ == "__main__":
    main()
