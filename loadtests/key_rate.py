"""Measure how exactly several frontends enforce the rate limit of one key.

    python loadtests/key_rate.py --url http://127.0.0.1:8000 --key bf_... --rate 200

Sends requests of one text over many connections, by default at twice the key's rate, and prints the
allowed, sent and answered requests per second. The first seconds, which use up the burst, do not
count.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections import Counter

import httpx

WARM_UP_SECONDS = 3.0


async def measure(
    url: str, key: str, sent: float, seconds: float, connections: int
) -> tuple[Counter[int], float]:
    """Send `sent` requests per second; return counts by status, and the seconds that it took."""
    statuses: Counter[int] = Counter()
    limits = httpx.Limits(max_connections=connections, max_keepalive_connections=connections)
    async with httpx.AsyncClient(base_url=url, limits=limits, timeout=30) as client:

        async def ask(counts: bool) -> None:
            body = {"input": "Shares rose after the quarterly report."}
            answer = await client.post("/classify", json=body, headers={"X-API-Key": key})
            statuses[answer.status_code] += counts

        async with asyncio.TaskGroup() as tasks:
            started = time.monotonic()
            for number in range(int((WARM_UP_SECONDS + seconds) * sent)):
                due = number / sent
                await asyncio.sleep(max(0.0, started + due - time.monotonic()))
                tasks.create_task(ask(counts=due >= WARM_UP_SECONDS))
            took = time.monotonic() - started - WARM_UP_SECONDS
    return statuses, took


def main() -> None:
    """Measure, and print one line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--key", required=True, help="a key with texts_per_second")
    parser.add_argument("--rate", type=float, required=True, help="the key's texts_per_second")
    parser.add_argument("--sent", type=float, help="requests per second; default: twice the rate")
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--connections", type=int, default=32)
    given = parser.parse_args()
    sent = given.sent or 2 * given.rate
    statuses, took = asyncio.run(
        measure(given.url, given.key, sent, given.seconds, given.connections)
    )
    print(
        f"allowed {given.rate:.1f}/s  sent {statuses.total() / took:.1f}/s  "
        f"answered {statuses[200] / took:.1f}/s  {dict(statuses)}"
    )


if __name__ == "__main__":
    main()
