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
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import psutil

from budgetformer.client import Client, UnreachableError
from loadtests.openloop import quantile
from loadtests.servers import START_SECONDS, family, free_port
from loadtests.texts import texts_of

MODEL, QUALITY = "ag_news", "balanced"
SETTLED_ROWS = 1000


class Server:
    """A server that stores its jobs in a folder, and can be killed and started again."""

    def __init__(self, state: Path, engines: int) -> None:
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        self._command = [
            sys.executable, "-m", "service.cli", "serve", f"--port={port}", f"--models={MODEL}",
            f"--state-dir={state}", f"--engines={engines}", "--log-level=error",
            "--quality-floor=balanced",
        ]  # fmt: skip
        self.start()

    def start(self) -> None:
        """Start the server, and return when it is ready."""
        self.process = subprocess.Popen(self._command, stdin=subprocess.DEVNULL)
        limit = time.monotonic() + START_SECONDS
        while time.monotonic() < limit:
            with suppress(httpx.TransportError):
                if httpx.get(f"{self.url}/health/ready").status_code == 200:
                    return
            time.sleep(0.1)
        raise SystemExit("the server did not start")

    def kill(self) -> None:
        """Kill all processes of the server at once."""
        processes = family(self.process.pid)
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)
        self.process.wait()
        psutil.wait_procs(processes, 10)

    def kill_job_process(self) -> None:
        """Kill the process that runs jobs."""
        for process in family(self.process.pid):
            if "service.jobs" in process.cmdline():
                os.kill(process.pid, signal.SIGKILL)

    def stop(self) -> None:
        """Stop the server with SIGTERM."""
        self.process.terminate()
        self.process.wait()


async def latencies(url: str, texts: Sequence[str], rate: float, seconds: float) -> list[float]:
    """Send requests of one text on a schedule; return latencies in seconds from the due times."""
    took: list[float] = []
    async with httpx.AsyncClient(base_url=url, timeout=30) as client:

        async def ask(text: str, due: float) -> None:
            body = {"input": text, "model": MODEL, "quality": QUALITY}
            answer = await client.post("/classify", json=body)
            answer.raise_for_status()
            took.append(time.monotonic() - due)

        async with asyncio.TaskGroup() as tasks:
            started = time.monotonic()
            for number in range(int(rate * seconds)):
                due = started + number / rate
                await asyncio.sleep(max(0.0, due - time.monotonic()))
                tasks.create_task(ask(texts[number % len(texts)], due))
    return took


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
        server = Server(Path(folder, "state"), given.engines)
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
        server.kill_job_process()
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
