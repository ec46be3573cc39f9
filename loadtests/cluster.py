"""Measure the overhead of a Ray cluster, and what its clients see of lost hosts and of scaling.

    python -m loadtests.cluster overhead   compares a plain server with a cluster on the same cores
    python -m loadtests.cluster kills      kills hosts of a cluster under load
    python -m loadtests.cluster scaling    overloads one engine until the cluster has added others

Needs the extra `cluster`. Hosts are Ray nodes on this machine, each with its own processes.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx

from loadtests.chaos.load import Load, Seen
from loadtests.chaos.server import MODEL
from loadtests.servers import Server, free_port, ours
from loadtests.texts import sentence
from service.cluster import RAY

_THIS_MACHINE = {
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_raylet_start_wait_time_s": "120",
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
}
for name, value in (RAY | _THIS_MACHINE).items():
    os.environ.setdefault(name, value)

PATIENCE = 120.0


def body_of(text: str) -> dict[str, object]:
    return {"input": text, "model": MODEL, "quality": "balanced", "timeout_ms": 30_000}


def until_ready(url: str, engines: int) -> float:
    """Wait until exactly `engines` engines have the model; return the seconds that it took.

    Raises:
        TimeoutError: that is not so after `PATIENCE` seconds.
    """
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
    raise TimeoutError(f"{url} does not have {engines} ready engines after {PATIENCE:g} s")


async def closed_loop(
    server: Server, client: httpx.AsyncClient, callers: int, requests: int
) -> tuple[list[float], float]:
    """Send requests with one text each from concurrent callers, closed-loop.

    Returns:
        The latencies and the server's processor time, in seconds.
    """
    took: list[float] = []
    left = iter(range(requests))
    before = server.cpu_seconds()

    async def call() -> None:
        for _ in left:
            began = time.perf_counter()
            answer = await client.post("/classify", json=body_of(sentence()))
            answer.raise_for_status()
            took.append(time.perf_counter() - began)

    await asyncio.gather(*(call() for _ in range(callers)))
    return took, server.cpu_seconds() - before


async def overhead(arguments: argparse.Namespace) -> None:
    """Measure both servers in turns; print medians over the rounds."""
    flags = (f"--models={MODEL}", f"--model-store={arguments.model_store}", "--dtype=float32")
    cores = sorted(os.sched_getaffinity(0))
    rows: dict[tuple[str, int], list[tuple[float, float, float, float]]] = {}
    idle = {}
    async with AsyncExitStack() as running:
        servers: dict[str, tuple[Server, httpx.AsyncClient]] = {}
        for name, more in (("plain", ()), ("Ray Serve", ("--cluster",))):
            server = ours(cores, *flags, *more, engines=arguments.engines)
            running.enter_context(server)
            client = httpx.AsyncClient(base_url=server.url, timeout=60)
            servers[name] = server, await running.enter_async_context(client)
            until_ready(server.url, arguments.engines)
            await closed_loop(*servers[name], 8, 200)
        for name, (server, _) in servers.items():
            before = server.cpu_seconds()
            await asyncio.sleep(10)
            idle[name] = (server.cpu_seconds() - before) / 10, server.memory()
        for _ in range(arguments.rounds):
            for name, asked in servers.items():
                for callers in (1, 16):
                    began = time.perf_counter()
                    took, spent = await closed_loop(*asked, callers, 40 * callers)
                    wall = time.perf_counter() - began
                    p99 = statistics.quantiles(took, n=100)[98]
                    row = (statistics.median(took), p99, len(took) / wall, spent / len(took))
                    rows.setdefault((name, callers), []).append(row)
    print("| server | callers | p50 ms | p99 ms | requests/s | processor ms per request |")
    print("|---|---|---|---|---|---|")
    for (name, callers), rounds in sorted(rows.items(), key=lambda row: row[0][1]):
        p50, p99, rate, spent = (statistics.median(column) for column in zip(*rounds, strict=True))
        figures = f"{1e3 * p50:.1f} | {1e3 * p99:.1f} | {rate:.0f} | {1e3 * spent:.2f}"
        print(f"| {name} | {callers} | {figures} |")
    for name, (share, mib) in idle.items():
        print(f"{name}, idle: {share:.3f} of a core, {mib:.0f} MiB")


class Hosts:
    """A cluster that serves the application: a head, and worker hosts that can be added or killed.

    Attributes:
        cluster: Ray's cluster.
        url: URL of the application.
    """

    def __init__(self, cluster: Any, url: str) -> None:
        self.cluster, self.url = cluster, url

    def add(self) -> None:
        """Add a host with room for one engine."""
        self.cluster.add_node(num_cpus=1)

    def kill(self) -> None:
        """Kill all processes of one host at once."""
        self.cluster.remove_node(next(iter(self.cluster.worker_nodes)), allow_graceful=False)


@contextmanager
def hosts(arguments: argparse.Namespace, pool: dict[str, Any]) -> Iterator[Hosts]:
    """Serve on a cluster of this machine, with two frontends and one pool of engines."""
    import ray
    from ray import serve
    from ray.cluster_utils import Cluster
    from ray.serve.config import HTTPOptions

    from service.cluster.application import NAME, build
    from service.settings import Pool, Settings

    port = free_port()
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    workers = Hosts(cluster, f"http://127.0.0.1:{port}")
    try:
        for _ in range(arguments.hosts):
            workers.add()
        ray.init(cluster.address, namespace="serve", log_to_driver=False)
        serve.start(proxy_location="HeadOnly", http_options=HTTPOptions(port=port))
        settings = Settings(
            model_store=arguments.model_store.resolve(), models=[MODEL], dtype="float32",
            pools={"engine": Pool(**pool)}, fronts=2, log_level="error",
        )  # fmt: skip
        serve.run(build(settings), name=NAME)
        until_ready(workers.url, pool["replicas"])
        yield workers
    finally:
        serve.shutdown()
        ray.shutdown()
        cluster.shutdown()


@contextmanager
def under_load(load: Load, seen: Seen) -> Iterator[None]:
    """Send requests while the block runs.

    They are sent from another thread, because Ray starts hosts only from the main thread.
    """
    finished = threading.Event()
    asyncio.run(load.learn())

    async def wait() -> None:
        await asyncio.to_thread(finished.wait)

    with ThreadPoolExecutor(1) as thread:
        sending = thread.submit(lambda: asyncio.run(load.during(seen, wait)))
        try:
            yield
        finally:
            finished.set()
        sending.result()


def kills(arguments: argparse.Namespace) -> None:
    """Kill worker hosts one after another, replacing each; print what the clients saw."""
    seen = Seen()
    with (
        hosts(arguments, {"replicas": arguments.hosts}) as workers,
        under_load(Load(workers.url, arguments.rate, quality="balanced"), seen),
    ):
        for _ in range(arguments.repeats):
            time.sleep(3)
            began = time.perf_counter()
            workers.kill()
            workers.add()
            time.sleep(6)  # until the dead engine no longer counts as alive
            until_ready(workers.url, arguments.hosts)
            seen.recovery.append(time.perf_counter() - began)
    print("| hosts killed | sent | answers | never answered | wrong | recovered after s |")
    print("|---|---|---|---|---|---|")
    print(f"| {' | '.join([str(len(seen.recovery)), *seen.cells()[:5]])} |")


def scaling(arguments: argparse.Namespace) -> None:
    """Overload one engine until the pool has its maximum, then stop; print both times."""
    seen = Seen()
    pool = {"replicas": 1, "max_replicas": arguments.hosts, "up_seconds": 5, "down_seconds": 15}
    with hosts(arguments, pool) as workers:
        load = Load(workers.url, arguments.rate, size=arguments.size, timeout_ms=10_000)
        with under_load(load, seen):
            up = until_ready(workers.url, arguments.hosts)
            time.sleep(10)
        down = until_ready(workers.url, 1)
    print("| engines | sent | answers | never answered | wrong | all after s | one after s |")
    print("|---|---|---|---|---|---|---|")
    counts = " | ".join(seen.cells()[:4])
    print(f"| 1 to {arguments.hosts} | {counts} | {up:.0f} | {down:.0f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("test", choices=["overhead", "kills", "scaling"])
    parser.add_argument("--model-store", type=Path, default=Path("model_store"))
    parser.add_argument("--engines", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--rate", type=float, default=10.0, help="requests per second")
    parser.add_argument("--size", type=int, default=64, help="texts per request, for scaling")
    parser.add_argument("--hosts", type=int, default=2, help="worker hosts, besides the head")
    arguments = parser.parse_args()
    if arguments.test == "overhead":
        asyncio.run(overhead(arguments))
    else:
        {"kills": kills, "scaling": scaling}[arguments.test](arguments)


if __name__ == "__main__":
    main()
