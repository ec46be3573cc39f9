"""`budgetformer serve`, in which one engine loses its device in its first batch.

The first engine that computes a batch creates the file named by LOST_DEVICE. From then on its
passes and its probe fail as on a GPU after an illegal memory access. Other engines work, and so
does its replacement.
"""

from __future__ import annotations

import os
import sys

ERROR = "CUDA error: an illegal memory access was encountered"


def serve() -> None:
    """Run the command line, with `engine` below in place of the usual engines."""
    from service.cli import main
    from service.control import supervisor

    original = supervisor.child_command

    def command(module: str, *arguments: str) -> list[str]:
        if module == "service.engine":
            return [sys.executable, __file__, *arguments]
        return original(module, *arguments)

    supervisor.child_command = command  # type: ignore[attr-defined]
    main()


def engine() -> None:
    """Run the fork server and its engines."""
    from budgetformer.inference import cascade
    from budgetformer.inference.cascade import Batch
    from budgetformer.inference.packed import PackedPass
    from service.engine import core
    from service.engine.__main__ import main

    run, probe = cascade.run, core.probe_device
    lost: list[bool] = []

    def failing_run(network: PackedPass, batch: Batch) -> None:
        if not lost:
            try:
                os.close(os.open(os.environ["LOST_DEVICE"], os.O_CREAT | os.O_EXCL))
                lost.append(True)
            except FileExistsError:
                lost.append(False)
        if lost[0]:
            raise RuntimeError(ERROR)
        run(network, batch)

    def failing_probe(device: str) -> None:
        if lost and lost[0]:
            raise RuntimeError(ERROR)
        probe(device)

    cascade.run = failing_run
    core.probe_device = failing_probe  # type: ignore[attr-defined]
    main()


if __name__ == "__main__":
    serve() if sys.argv[1] == "serve" else engine()
