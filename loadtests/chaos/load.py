"""Clients that send on a fixed schedule (open loop) and check the answers."""

from __future__ import annotations

import asyncio
import itertools
import random
import statistics
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

from loadtests.chaos.server import MODEL, PATIENCE, Server
from loadtests.texts import sentence

RATE = 30.0
"""Requests per second."""
TOLERANCE = 1e-4
"""Accepted difference of a probability: batches may sum in another order."""
_TEXTS = 400


@dataclass
class Seen:
    """What clients saw during one fault.

    Attributes:
        sent: number of requests.
        outcomes: counts by HTTP status and code, or `broke off`.
        wrong: number of answers that differ from those before the fault.
        models: counts of answers by model name and version.
        recovery: seconds until all processes were back, one per injection.
        memory: MiB of all processes over time.
        notes: further observations.
    """

    sent: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    wrong: int = 0
    models: Counter[str] = field(default_factory=Counter)
    recovery: list[float] = field(default_factory=list)
    memory: list[float] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def hung(self) -> int:
        """Requests that were never answered."""
        return self.sent - self.outcomes.total()

    def cells(self) -> list[str]:
        """Return the cells of the table."""
        outcomes = ", ".join(f"{name}: {count:,}" for name, count in sorted(self.outcomes.items()))
        back = memory = ""
        if self.recovery:
            back = f"{statistics.median(self.recovery):.1f} / {max(self.recovery):.1f}"
        if self.memory:
            memory = f"{self.memory[-1] - self.memory[0]:+.0f} MiB"
        counts = [f"{self.sent:,}", outcomes, str(self.hung), str(self.wrong)]
        return [*counts, back, memory, "; ".join(self.notes)]


class Load:
    """The clients of one server.

    Args:
        url: URL of the server.
        rate: requests per second.
        texts: texts to send; None: synthetic sentences.
        size: texts per request.
        **fields: further fields of each request.
    """

    def __init__(
        self,
        url: str,
        rate: float = RATE,
        texts: Sequence[str] | None = None,
        size: int = 1,
        **fields: Any,
    ) -> None:
        if texts is None:
            random.seed(0)
            texts = sorted({sentence() for _ in range(_TEXTS)})
            random.Random(0).shuffle(texts)
        self._texts, self._size = texts, size
        self._rate, self._url = rate, url
        self._fields = {"model": MODEL, "quality": "best", "timeout_ms": 30_000} | fields
        self._right: dict[str, list[float]] = {}

    async def learn(self) -> None:
        """Record the expected answer of every text."""
        async with httpx.AsyncClient(base_url=self._url, timeout=PATIENCE) as client:
            answer = await client.post("/classify", json=self._body(self._texts))
            answer.raise_for_status()
        probabilities = (item["probs"] for item in answer.json()["data"])
        self._right = dict(zip(self._texts, probabilities, strict=True))

    async def during(self, seen: Seen, work: Callable[[], Awaitable[None]]) -> None:
        """Send requests until the work is done, and count the outcomes."""
        done = asyncio.ensure_future(work())
        limits = httpx.Limits(max_connections=500, max_keepalive_connections=20)
        async with httpx.AsyncClient(base_url=self._url, timeout=PATIENCE, limits=limits) as client:
            asked, texts, due = [], itertools.cycle(self._texts), time.perf_counter()
            while not done.done():
                due += 1 / self._rate
                await asyncio.sleep(max(0.0, due - time.perf_counter()))
                seen.sent += 1
                some = list(itertools.islice(texts, self._size))
                asked.append(asyncio.create_task(self._ask(client, some, seen)))
            await asyncio.gather(*asked)
        await done

    async def _ask(self, client: httpx.AsyncClient, texts: list[str], seen: Seen) -> None:
        try:
            answer = await client.post("/classify", json=self._body(texts))
        except httpx.TimeoutException:
            return  # never answered
        except httpx.TransportError:
            seen.outcomes["broke off"] += 1
            return
        if answer.status_code == 200:
            seen.outcomes["200"] += 1
            answer_body = answer.json()
            seen.models[answer_body["model"]] += 1
            found = [item["probs"] for item in answer_body["data"]]
            seen.wrong += not all(map(self._fits, texts, found)) or len(found) != len(texts)
        else:
            seen.outcomes[f"{answer.status_code} {_code(answer)}"] += 1

    def _fits(self, text: str, found: list[float]) -> bool:
        right = self._right[text]
        return len(found) == len(right) and all(
            abs(a - b) <= TOLERANCE for a, b in zip(found, right, strict=True)
        )

    def _body(self, texts: Sequence[str]) -> dict[str, Any]:
        return {"input": texts} | self._fields


def _code(answer: httpx.Response) -> str:
    """Return the code of our error format, or the beginning of a body in another format."""
    try:
        return str(answer.json()["error"]["code"])
    except (ValueError, KeyError, TypeError):
        return answer.text[:60]


async def under_load(
    server: Server, work: Callable[[Seen], Awaitable[None]], rate: float = RATE
) -> Seen:
    """Inject a fault into a server under load, and return what clients saw."""
    load, seen = Load(server.url, rate), Seen()
    await load.learn()
    await load.during(seen, lambda: work(seen))
    return seen
