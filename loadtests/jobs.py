"""Jobs under load and under fire: their rate, what callers notice of them, and what kills cost.

    python -m loadtests.jobs [--data ag_news/test.parquet]

prints the rows per second of a job alone; the median and the 99th percentile of single requests, on
a schedule, without and beside a job; and what became of a job whose process, and then whose server,
was killed: whether each row is there once, in its place, with the answer of POST /classify.
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
    """A server that keeps its jobs in a folder, and may be killed and started again."""

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
        """Start it, and return when it is ready."""
        self.process = subprocess.Popen(self._command, stdin=subprocess.DEVNULL)
        limit = time.monotonic() + START_SECONDS
        while time.monotonic() < limit:
            with suppress(httpx.TransportError):
                if httpx.get(f"{self.url}/health/ready").status_code == 200:
                    return
            time.sleep(0.1)
        raise SystemExit("the server did not start")

    def kill(self) -> None:
        """Kill all of its processes at once."""
        everybody = family(self.process.pid)
        for process in everybody:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)
        self.process.wait()
        psutil.wait_procs(everybody, 10)

    def kill_job_process(self) -> None:
        """Kill the process that runs jobs."""
        for process in family(self.process.pid):
            if "service.jobs" in process.cmdline():
                os.kill(process.pid, signal.SIGKILL)

    def stop(self) -> None:
        """End it in order."""
        self.process.terminate()
        self.process.wait()


async def latencies(url: str, texts: Sequence[str], rate: float, seconds: float) -> list[float]:
    """Ask for single texts on a schedule; return the seconds from when each was due."""
    found: list[float] = []
    async with httpx.AsyncClient(base_url=url, timeout=30) as client:

        async def ask(text: str, due: float) -> None:
            body = {"input": text, "model": MODEL, "quality": QUALITY}
            answer = await client.post("/classify", json=body)
            answer.raise_for_status()
            found.append(time.monotonic() - due)

        async with asyncio.TaskGroup() as tasks:
            started = time.monotonic()
            for number in range(int(rate * seconds)):
                due = started + number / rate
                await asyncio.sleep(max(0.0, due - time.monotonic()))
                tasks.create_task(ask(texts[number % len(texts)], due))
    return found


def told(name: str, found: Sequence[float]) -> str:
    """Return one line about latencies."""
    p50, p99 = (1000 * quantile(found, share) for share in (0.5, 0.99))
    return f"{name}: p50 {p50:.1f} ms, p99 {p99:.1f} ms ({len(found)} requests)"


def wait_for_rows(client: Client, job: str, rows: int) -> dict[str, Any]:
    """Return a job when so many of its rows are answered."""
    while True:
        with suppress(UnreachableError):
            found = client.job(job)
            if found["rows"] >= rows or found["status"] not in ("queued", "running"):
                return found
        time.sleep(0.05)


def compare(client: Client, texts: Sequence[str], rows: Sequence[dict[str, Any]]) -> str:
    """Say how the rows of a result differ from the texts and from POST /classify."""
    places = sum(row["text"] != text for row, text in zip(rows, texts, strict=False))
    answers = client.classify(texts, model=MODEL, quality=QUALITY, timeout=600)
    others = [
        row
        for row, answer in zip(rows, answers, strict=False)
        if (row.get("label"), row.get("macs")) != (answer.label, answer.macs)  # type: ignore[union-attr]
    ]
    return (
        f"rows in {len(texts)}, rows out {len(rows)}, in another place {places}, "
        f"other answers than POST /classify {len(others)}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="a table of texts; none: made-up ones")
    parser.add_argument("--rows", type=int, default=20_000, help="of the job")
    parser.add_argument("--engines", type=int, default=1)
    parser.add_argument("--rate", type=float, default=20.0, help="single requests a second")
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
        print(f"a job alone: {done['rows_per_second']:.0f} rows/s ({done['rows']} rows)")
        asked = server.url, drawn, given.rate, given.seconds
        print(told("callers without a job", asyncio.run(latencies(*asked))))
        job = submit()
        wait_for_rows(client, job, SETTLED_ROWS)
        print(told("callers beside a job", asyncio.run(latencies(*asked))))
        beside = client.job(job)
        print(f"the job beside them: {beside['rows_per_second']:.0f} rows/s, {beside['status']}")
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
        print(f"after kill -9 of its process and of the server: {last['status']}")
        print(compare(client, texts, rows))
        client.close()
        server.stop()


if __name__ == "__main__":
    main()
