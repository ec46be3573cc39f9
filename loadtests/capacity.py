"""Measure the texts per second of processor time, by model and quality level.

    python loadtests/capacity.py --data data [--models ag_news imdb] [--seconds 4]

`--data` has a folder with test.parquet for each model. The server has the first core and the client
the last one. Figures count the processor time of frontends and engines, and are for requests of 64
texts; in brackets, for requests of one text from 32 callers.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from budgetformer.cost.processor import processor_name
from budgetformer.training.data import read_texts
from budgetformer.training.pages import markdown_table
from loadtests.contenders import OURS
from loadtests.easy import ask
from loadtests.servers import Server, ours

TEXTS = 1000


@dataclass(frozen=True)
class Load:
    """Rounds of `requests` requests with `texts` texts each, from `callers` concurrent callers."""

    texts: int
    callers: int
    requests: int

    def rate(
        self, server: Server, items: Sequence[Any], fields: dict[str, Any], seconds: float
    ) -> float:
        """Return the texts per second of the server's processor time."""
        groups = [items[i : i + self.texts] for i in range(0, len(items), self.texts)]
        bodies = [json.dumps({"input": group} | fields).encode() for group in groups]
        rounds = itertools.cycle(
            (sum(map(len, groups[i : i + self.requests])), bodies[i : i + self.requests])
            for i in range(0, len(groups), self.requests)
        )

        def answer_round() -> int:
            count, part = next(rounds)
            for _ in ask(server.url, part, self.callers):
                pass
            return count

        answer_round()
        before, end, answered = server.cpu_seconds(), time.monotonic() + seconds, 0
        while time.monotonic() < end:
            answered += answer_round()
        return answered / (server.cpu_seconds() - before)


MANY, ONE = Load(64, 2, 2), Load(1, 32, 256)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--models", nargs="+", default=["ag_news", "banking77", "imdb", "snli"])
    parser.add_argument("--seconds", type=float, default=4.0)
    given = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))
    rows = []
    with ours(cores[:1], *(f"--models={name}" for name in given.models)) as server:
        os.sched_setaffinity(0, cores[-1:])
        for name in given.models:
            examples = read_texts(given.data / name / "test.parquet").evenly(TEXTS)
            texts: list[Any] = list(examples.texts)
            if examples.pairs is not None:
                texts = [
                    {"text": a, "text_pair": b} for a, b in zip(texts, examples.pairs, strict=True)
                ]
            cells = []
            for level, fields in OURS.items():
                many, one = (
                    load.rate(server, texts, fields | {"model": name}, given.seconds)
                    for load in (MANY, ONE)
                )
                cells.append(f"{many:,.0f} ({one:,.0f})")
                print(f"{name}, {level}: {cells[-1]}", flush=True)
            rows.append([name, *cells])
    print(f"\n{processor_name()}\n\n{markdown_table(['', *OURS], rows)}")


if __name__ == "__main__":
    main()
