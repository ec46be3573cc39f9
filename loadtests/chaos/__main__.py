"""Inject every fault into servers under load, and print a table of what their clients saw.

    python -m loadtests.chaos [--only kills hangs ...] [--repeats 20]

Each fault has servers of its own (two engines, two frontends) and callers on a schedule that does
not wait for answers. Before anything breaks, the answer of every text is noted: afterwards one that
differs is wrong. A fault for which this machine lacks something is named with what it lacks. The
exit code is 1 if an answer was wrong or a request was never answered.
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
    "fault", "promised", "sent", "answers", "hung", "wrong", "back after s, median / most",
    "memory", "seen besides",
)  # fmt: skip
Run = Callable[[int], Awaitable[Seen]]


@dataclass(frozen=True)
class Fault:
    """A fault to inject.

    Attributes:
        run: injects the fault a number of times, and returns what clients saw.
        promise: the guarantee to clients.
        lacks: returns the requirement that this machine lacks, if any.
    """

    run: Run
    promise: str
    lacks: Callable[[], str | None] = lambda: None


FAULTS = {
    "kills": Fault(
        processes.kills, "others answer; only connections to a frontend that dies break off"
    ),
    "hangs": Fault(processes.hangs, "the same, within `hang_seconds` (4)"),
    "slow-device": Fault(processes.slow_device, "slower answers; the engine is not taken for dead"),
    "swaps": Fault(models.swaps, "no request notices"),
    "store-damaged": Fault(
        models.damaged, "a damaged file is refused by name; what is served stays"
    ),
    "nan": Fault(
        models.not_finite,
        "at load: refused by name; for some token: that text alone gets an error",
    ),
    "tokenizer": Fault(models.panics, "a text that it fails on gets an error, a file is refused"),
    "memory": Fault(
        machine.memory,
        "the kernel kills one process; the load fails, others answer",
        machine.no_memory_group,
    ),
    "disk": Fault(machine.disk, "lines of the log are lost, nothing else", machine.no_small_disk),
    "clock": Fault(machine.clock, "nothing depends on it", machine.no_faketime),
    "link": Fault(network.link, "slower answers, all of them", network.no_link),
    "readers": Fault(network.readers, "they are closed; memory stays bounded"),
    "fork": Fault(
        supervision.fork,
        "what cannot be started is named and tried again; the others answer",
        supervision.no_pids_group,
    ),
    "store-driver": Fault(supervision.store, "the error is shown; what is served stays"),
    "scrape": Fault(supervision.scrape, "every scrape is answered, and every other question"),
    "stalled-hub": Fault(
        supervision.stalled, "others answer; `/metrics` is 503 within 5 s, and no count is lost"
    ),
    "port": Fault(supervision.port, "one line and the end of the second server; no probe fails"),
    "rolling": Fault(rolling.rolling, "no request fails", rolling.no_proxy),
}


async def run(names: list[str], repeats: int) -> tuple[list[str], bool]:
    """Return the table, and whether no answer was wrong and no request hung."""
    rows, good = [f"| {' | '.join(HEADS)} |", f"|{'---|' * len(HEADS)}"], True
    for name in names:
        fault = FAULTS[name]
        lacking = fault.lacks()
        if lacking:
            cells = [*[""] * (len(HEADS) - 3), f"not run: {lacking}"]
        else:
            seen = await fault.run(repeats)
            good = good and not seen.wrong and not seen.hung
            cells = seen.cells()
        rows.append(f"| {' | '.join([name, fault.promise, *cells])} |")
        print(rows[-1], file=sys.stderr, flush=True)
    return rows, good


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m loadtests.chaos",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", nargs="+", choices=FAULTS, default=list(FAULTS))
    parser.add_argument("--repeats", type=int, default=20, help="kills; others in proportion")
    arguments = parser.parse_args()
    rows, good = asyncio.run(run(arguments.only, arguments.repeats))
    print("\n".join(rows))
    sys.exit(not good)


if __name__ == "__main__":
    main()
