"""Measure jobs: their rate, the latency of other requests meanwhile, and recovery from kills.

    python -m loadtests.jobs [--data ag_news/test.parquet]

Prints the rows per second of a job without other load; the median and 99th percentile latency of
single requests on a schedule, without and with a running job; and the result of a job whose process
and then whole server were killed: whether each row is there exactly once, in order, with the answer
of POST /classify.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from budgetformer.client import Client, UnreachableError
from loadtests.openloop import Client as OpenLoop
from loadtests.openloop import quantile
from loadtests.servers import Server, ours
from loadtests.texts import texts_of

MODEL, QUALITY = "ag_news", "balanced"
SETTLED_ROWS = 1000


def kill_job_process(server: Server) -> None:
    """Kill the process that runs jobs."""
    for process in server.family():
        if "service.jobs" in process.cmdline():
            process.kill()


async def latencies(url: str, texts: Sequence[str], rate: float, seconds: float) -> list[float]:
    """Send requests of one text on a schedule; return latencies in seconds from the due times."""
    client = OpenLoop(f"{url}/classify", spin=False)
    requests = [
        client.request({"input": text, "model": MODEL, "quality": QUALITY}) for text in texts
    ]
    phase = await client.scheduled("single texts", requests, rate, seconds)
    client.close()
    if phase.statuses["200"] < phase.due:
        raise SystemExit(f"single texts were answered with {dict(phase.statuses)}")
    return [latency for _, latency in phase.answered]


def summary(name: str, latencies: Sequence[float]) -> str:
    """Return one line about latencies."""
    p50, p99 = (1000 * quantile(latencies, share) for share in (0.5, 0.99))
    return f"{name}: p50 {p50:.1f} ms, p99 {p99:.1f} ms ({len(latencies)} requests)"


def wait_for_rows(client: Client, job: str, rows: int) -> dict[str, Any]:
    """Return the status of a job once `rows` rows are answered or the job has ended."""
    while True:
        with suppress(UnreachableError):
            status = client.job(job)
            if status["rows"] >= rows or status["status"] not in ("queued", "running"):
                return status
        time.sleep(0.05)


def compare(client: Client, texts: Sequence[str], rows: Sequence[dict[str, Any]]) -> str:
    """Return how the rows of a result differ from the texts and from POST /classify."""
    misplaced = sum(row["text"] != text for row, text in zip(rows, texts, strict=False))
    answers = client.classify(texts, model=MODEL, quality=QUALITY, timeout=600)
    different = [
        row
        for row, answer in zip(rows, answers, strict=False)
        if (row.get("label"), row.get("macs")) != (answer.label, answer.macs)  # type: ignore[union-attr]
    ]
    return (
        f"{len(texts)} rows sent, {len(rows)} received, {misplaced} out of order, "
        f"{len(different)} with another answer than from POST /classify"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="table of texts; default: synthetic texts")
    parser.add_argument("--rows", type=int, default=20_000, help="rows of the job")
    parser.add_argument("--engines", type=int, default=1)
    parser.add_argument("--rate", type=float, default=20.0, help="single requests per second")
    parser.add_argument("--seconds", type=float, default=20.0)
    given = parser.parse_args()
    drawn = texts_of(given.data, given.rows)
    texts = [f"{drawn[i % len(drawn)]} ({i})" for i in range(given.rows)]
    with tempfile.TemporaryDirectory() as folder:
        file, output = Path(folder, "texts.jsonl"), Path(folder, "answers.jsonl")
        file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        server = ours(
            sorted(os.sched_getaffinity(0)), f"--models={MODEL}", "--quality-floor=balanced",
            f"--state-dir={folder}/state", engines=given.engines,
        ).start()  # fmt: skip
        client = Client(server.url)

        def submit() -> str:
            return str(client.submit_job(file, model=MODEL, quality=QUALITY)["id"])

        job = submit()
        done = client.follow_job(job)
        print(f"job alone: {done['rows_per_second']:.0f} rows/s ({done['rows']} rows)")
        load = server.url, drawn, given.rate, given.seconds
        print(summary("requests without a job", asyncio.run(latencies(*load))))
        job = submit()
        wait_for_rows(client, job, SETTLED_ROWS)
        print(summary("requests during a job", asyncio.run(latencies(*load))))
        loaded = client.job(job)
        print(f"job during requests: {loaded['rows_per_second']:.0f} rows/s, {loaded['status']}")
        client.cancel_job(job)
        job = submit()
        wait_for_rows(client, job, given.rows // 4)
        kill_job_process(server)
        wait_for_rows(client, job, given.rows // 2)
        server.kill()
        server.start()
        last = client.follow_job(job)
        client.save_job_result(job, output)
        rows = [json.loads(line) for line in output.read_bytes().splitlines()]
        print(f"job after kill -9 of its process and of the server: {last['status']}")
        print(compare(client, texts, rows))
        client.close()
        server.stop()


if __name__ == "__main__":
    main()
