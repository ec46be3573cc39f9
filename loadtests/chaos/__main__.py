"""Inject every fault into servers under load, and print a table of what their clients saw.

    python -m loadtests.chaos [--only kills hangs ...] [--repeats 20]

Each fault gets its own server (two engines, two frontends) and clients that send on a schedule
(open loop). The answers to all texts are recorded before the fault; a different answer during or
after it counts as wrong. If this machine lacks a requirement of a fault, its row names it. The exit
code is 1 if an answer was wrong or a request was never answered.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from loadtests.chaos import machine, models, network, processes, rolling, supervision
from loadtests.chaos.load import Seen

HEADS = (
    "fault", "expected", "sent", "answers", "never answered", "wrong",
    "recovery in seconds, median / most", "memory", "notes",
)  # fmt: skip
Run = Callable[[int], Awaitable[Seen]]


@dataclass(frozen=True)
class Fault:
    """A fault to inject.

    Attributes:
        run: injects the fault a number of times, and returns what clients saw.
        expected: the guarantee to clients.
        missing: returns the requirement that this machine lacks, if any.
    """

    run: Run
    expected: str
    missing: Callable[[], str | None] = lambda: None


FAULTS = {
    "kills": Fault(
        processes.kills,
        "other processes answer; only connections to a killed frontend break off",
    ),
    "hangs": Fault(processes.hangs, "the same, within `hang_seconds` (4)"),
    "slow-device": Fault(processes.slow_device, "slower answers; the engine is not killed"),
    "swaps": Fault(models.swaps, "no request fails"),
    "store-damaged": Fault(
        models.damaged, "the load fails and names the damaged file; served models stay"
    ),
    "nan": Fault(
        models.not_finite,
        "non-finite weights: the load fails; overflow at one token: only such texts get an error",
    ),
    "tokenizer": Fault(
        models.panics, "a panic at a text: only this text gets an error; at load: the load fails"
    ),
    "memory": Fault(
        machine.memory,
        "the kernel kills one process; the load fails, other processes answer",
        machine.no_memory_group,
    ),
    "disk": Fault(machine.disk, "only lines of the log are lost", machine.no_small_disk),
    "clock": Fault(machine.clock, "no effect", machine.no_faketime),
    "link": Fault(network.link, "slower answers, but all of them", network.no_link),
    "readers": Fault(network.readers, "slow connections are closed; memory stays bounded"),
    "fork": Fault(
        supervision.fork,
        "`/health` names the process that cannot start; it is retried; others answer",
        supervision.no_pids_group,
    ),
    "store-driver": Fault(supervision.store, "`/health` shows the error; served models stay"),
    "scrape": Fault(supervision.scrape, "every scrape and every other request is answered"),
    "stalled-hub": Fault(
        supervision.stalled,
        "requests are answered; `/metrics` is 503 within 5 s, and no count is lost",
    ),
    "port": Fault(
        supervision.port, "the second server ends with one line of error; no probe fails"
    ),
    "rolling": Fault(rolling.rolling, "no request fails", rolling.no_proxy),
}


async def run(names: list[str], repeats: int) -> tuple[list[str], bool]:
    """Return the table, and whether no answer was wrong and no request hung."""
    rows, good = [f"| {' | '.join(HEADS)} |", f"|{'---|' * len(HEADS)}"], True
    for name in names:
        fault = FAULTS[name]
        missing = fault.missing()
        if missing:
            cells = [*[""] * (len(HEADS) - 3), f"not run: {missing}"]
        else:
            seen = await fault.run(repeats)
            good = good and not seen.wrong and not seen.hung
            cells = seen.cells()
        rows.append(f"| {' | '.join([name, fault.expected, *cells])} |")
        print(rows[-1], file=sys.stderr, flush=True)
    return rows, good


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m loadtests.chaos",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", nargs="+", choices=FAULTS, default=list(FAULTS))
    parser.add_argument(
        "--repeats", type=int, default=20, help="number of kills; other faults in proportion"
    )
    arguments = parser.parse_args()
    rows, good = asyncio.run(run(arguments.only, arguments.repeats))
    print("\n".join(rows))
    sys.exit(not good)


if __name__ == "__main__":
    main()
