"""What a Ray cluster costs, and what its callers see when one of its hosts dies.

    python loadtests/cluster.py overhead   plain server and cluster on the same cores, by turns
    python loadtests/cluster.py kills      kills hosts of a cluster under load

Needs the extra `cluster`. Hosts are Ray nodes on this machine, each with processes of its own.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import os
import random
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

# Ray gives its workers what other processes leave; here they are the server.
os.environ |= {
    "RAY_worker_niceness": "0",
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    "RAY_AUTH_MODE": "disabled",
}
os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60"}

import httpx
import psutil
from servers import family, free_port, memory
from texts import sentence

MODEL = "ag_news"
PATIENCE = 120.0


def body_of(texts: str | list[str]) -> dict[str, object]:
    return {"input": texts, "model": MODEL, "quality": "balanced", "timeout_ms": 30_000}


def until_ready(url: str, engines: int) -> float:
    """Wait until the server has so many engines with the model, and return the seconds."""
    began = time.perf_counter()
    while time.perf_counter() - began < PATIENCE:
        try:
            health = httpx.get(f"{url}/health", timeout=10).json()
            ready = [e for e in health["engines"] if e["alive"] and e["models"]]
            if health["status"] == "ok" and len(ready) == engines:
                return time.perf_counter() - began
        except (httpx.HTTPError, ValueError, KeyError):
            pass
        time.sleep(0.2)
    raise SystemExit("the server is not ready")


class Server:
    """A server of this machine, plain or on a cluster of one host."""

    def __init__(self, arguments: argparse.Namespace, cluster: bool) -> None:
        self.name = "Ray Serve" if cluster else "plain"
        self.engines = arguments.engines
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        self.client = httpx.AsyncClient(base_url=self.url, timeout=60)
        flags = {
            "port": port, "engines": self.engines, "models": f'["{MODEL}"]',
            "model-store": arguments.model_store, "log-level": "error", "dtype": "float32",
        }  # fmt: skip
        given = [f"--{name}={value}" for name, value in flags.items()]
        command = [sys.executable, "-m", "service.cli", "serve", *given]
        self._process = subprocess.Popen(
            [*command, "--cluster"] if cluster else command,
            stdin=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )

    def family(self) -> list[psutil.Process]:
        return family(self._process.pid)

    def seconds(self) -> float:
        """Return the processor time that all processes have used."""
        return sum(sum(process.cpu_times()[:2]) for process in self.family())

    def memory(self) -> float:
        """Return the MiB that all processes hold, pages that they share counted once."""
        return memory(self.family())

    async def stop(self) -> None:
        await self.client.aclose()
        self._process.terminate()
        self._process.wait(60)


async def closed_loop(server: Server, callers: int, requests: int) -> tuple[list[float], float]:
    """Let callers ask one text after the other; return latencies and processor seconds."""
    took: list[float] = []
    left = iter(range(requests))
    before = server.seconds()

    async def call() -> None:
        for _ in left:
            began = time.perf_counter()
            answer = await server.client.post("/classify", json=body_of(sentence()))
            answer.raise_for_status()
            took.append(time.perf_counter() - began)

    await asyncio.gather(*(call() for _ in range(callers)))
    return took, server.seconds() - before


async def overhead(arguments: argparse.Namespace) -> None:
    """Ask both servers by turns, in rounds; print medians over the rounds."""
    servers = [Server(arguments, cluster) for cluster in (False, True)]
    rows: dict[tuple[str, int], list[tuple[float, float, float, float]]] = {}
    idle = {}
    try:
        for server in servers:
            until_ready(server.url, arguments.engines)
            await closed_loop(server, 8, 200)
        for server in servers:
            before = server.seconds()
            await asyncio.sleep(10)
            idle[server.name] = (server.seconds() - before) / 10, server.memory()
        for _ in range(arguments.rounds):
            for server in servers:
                for callers in (1, 16):
                    began = time.perf_counter()
                    took, spent = await closed_loop(server, callers, 40 * callers)
                    wall = time.perf_counter() - began
                    p99 = statistics.quantiles(took, n=100)[98]
                    row = (statistics.median(took), p99, len(took) / wall, spent / len(took))
                    rows.setdefault((server.name, callers), []).append(row)
    finally:
        for server in servers:
            await server.stop()
    print("| server | callers | p50 ms | p99 ms | requests/s | processor ms per request |")
    print("|---|---|---|---|---|---|")
    for (name, callers), found in sorted(rows.items(), key=lambda row: row[0][1]):
        p50, p99, rate, spent = (statistics.median(column) for column in zip(*found, strict=True))
        figures = f"{1e3 * p50:.1f} | {1e3 * p99:.1f} | {rate:.0f} | {1e3 * spent:.2f}"
        print(f"| {name} | {callers} | {figures} |")
    for name, (share, held) in idle.items():
        print(f"{name}, idle: {share:.3f} of a core, {held:.0f} MiB")


class Callers(threading.Thread):
    """Callers on a schedule that does not wait for answers, who know the right ones."""

    def __init__(self, url: str, rate: float) -> None:
        super().__init__()
        self._url, self._rate = url, rate
        self._enough = threading.Event()
        self.sent = self.wrong = 0
        self.outcomes: Counter[str] = Counter()
        random.seed(0)
        texts = sorted({sentence() for _ in range(200)})
        answer = httpx.post(f"{url}/classify", json=body_of(texts), timeout=60).json()
        labels = [item["label"] for item in answer["data"]]
        self._right = dict(zip(texts, labels, strict=True))

    def run(self) -> None:
        asyncio.run(self._send())

    def stop(self) -> None:
        """Send no more, and wait for what is on its way."""
        self._enough.set()
        self.join()

    async def _send(self) -> None:
        asked, texts, due = [], itertools.cycle(self._right), time.perf_counter()
        async with httpx.AsyncClient(base_url=self._url, timeout=PATIENCE) as client:
            while not self._enough.is_set():
                due += 1 / self._rate
                await asyncio.sleep(max(0.0, due - time.perf_counter()))
                self.sent += 1
                asked.append(asyncio.create_task(self._ask(client, next(texts))))
            await asyncio.gather(*asked)

    async def _ask(self, client: httpx.AsyncClient, text: str) -> None:
        try:
            answer = await client.post("/classify", json=body_of(text))
        except httpx.TimeoutException:
            return  # never answered
        except httpx.TransportError:
            self.outcomes["broke off"] += 1
            return
        self.outcomes[str(answer.status_code)] += 1
        if answer.status_code == 200:
            self.wrong += answer.json()["data"][0]["label"] != self._right[text]
        else:
            print(answer.status_code, answer.text[:200], file=sys.stderr)


def kills(arguments: argparse.Namespace) -> None:
    """Kill one worker host after the other, each replaced by a new one; print what callers saw."""
    import ray
    from ray import serve
    from ray.cluster_utils import Cluster
    from ray.serve.config import HTTPOptions

    from service.cluster.application import NAME, build
    from service.settings import Pool, Settings

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    for _ in range(arguments.hosts):
        cluster.add_node(num_cpus=1)
    ray.init(cluster.address, namespace="serve", log_to_driver=False)
    port = free_port()
    serve.start(proxy_location="HeadOnly", http_options=HTTPOptions(port=port))
    settings = Settings(
        model_store=arguments.model_store.resolve(), models=[MODEL], dtype="float32",
        pools={"engine": Pool(replicas=arguments.hosts)}, log_level="error",
    )  # fmt: skip
    back = []
    try:
        serve.run(build(settings), name=NAME)
        url = f"http://127.0.0.1:{port}"
        until_ready(url, arguments.hosts)
        callers = Callers(url, arguments.rate)
        callers.start()
        for _ in range(arguments.repeats):
            time.sleep(3)
            began = time.perf_counter()
            cluster.remove_node(next(iter(cluster.worker_nodes)), allow_graceful=False)
            cluster.add_node(num_cpus=1)
            time.sleep(6)  # until the dead one does not count as alive any more
            until_ready(url, arguments.hosts)
            back.append(time.perf_counter() - began)
        callers.stop()
    finally:
        serve.shutdown()
        ray.shutdown()
        cluster.shutdown()
    told = ", ".join(f"{name}: {count}" for name, count in sorted(callers.outcomes.items()))
    lost = callers.sent - callers.outcomes.total()
    after = f"{statistics.median(back):.0f} / {max(back):.0f}"
    print("| hosts killed | sent | answers | never answered | wrong | whole again after s |")
    print("|---|---|---|---|---|---|")
    print(f"| {len(back)} | {callers.sent} | {told} | {lost} | {callers.wrong} | {after} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["overhead", "kills"])
    parser.add_argument("--model-store", type=Path, default=Path("model_store"))
    parser.add_argument("--engines", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--rate", type=float, default=10.0, help="requests a second")
    parser.add_argument("--hosts", type=int, default=2, help="besides the head")
    arguments = parser.parse_args()
    if arguments.what == "kills":
        kills(arguments)
    else:
        asyncio.run(overhead(arguments))


if __name__ == "__main__":
    main()
