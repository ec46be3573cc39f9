"""Measure the processor time that an engine spends on a text outside of its passes.

    python loadtests/engine.py [--model model_store/ag_news/3] [--texts 20000]

The engine and its encoded messages are real; its network answers at once with random logits. So the
time that remains is for decoding, admission, queues, batches, escalation and answers. The texts are
random tokens, and their steps those that the model's `balanced` level chooses.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from budgetformer.inference.packed import PackedTokens, PassResult
from budgetformer.inference.texts import Texts, TokenColumns
from service.engine.core import EngineCore, EngineOptions
from service.ipc.engine_client import Submission, request_of
from service.ipc.engine_messages import TO_ENGINE, Answer, Load, ToEngine, ToFrontend
from service.pipeline.served_models import open_model

SIZES = (1, 16, 64, 512)
"""Texts in a request."""
IN_FLIGHT = 8
"""Requests in flight."""
TOKENS = 40
OPTIONS = EngineOptions(max_queue_items=2**20, batch_seconds=10.0)
"""Batches as large as on a fast device: their price does not limit them."""
MODEL = Path("model_store/ag_news/3")

_encode = msgspec.msgpack.Encoder().encode


class InstantPass:
    """A pass that returns random logits at once.

    Attributes:
        seconds: processor time that the calls have taken.
    """

    def __init__(self, classes: int, heads: list[tuple[int, ...]]) -> None:
        self.seconds = 0.0
        self._answers = torch.randn(4096, classes, generator=torch.Generator().manual_seed(0))
        self._heads = heads

    def run(self, tokens: PackedTokens, *_: Any) -> PassResult:
        """Return random logits."""
        started = time.thread_time()
        count = len(tokens.lengths)
        result = PassResult(self._answers[:count], [self._heads] * count)
        self.seconds += time.thread_time() - started
        return result


async def measure(path: Path, texts: int, size: int) -> float:
    """Return the processor time per text in microseconds, for requests of `size` texts."""
    served = open_model(path)
    assert served.decider is not None
    core = EngineCore(OPTIONS, precision="float32")
    pending: dict[int, asyncio.Future[ToFrontend]] = {}
    encode_seconds = 0.0

    def reply(message: ToFrontend) -> None:
        _encode(message)
        if hasattr(message, "id"):
            pending[message.id].set_result(message)

    async def ask(number: int, message: ToEngine) -> ToFrontend:
        nonlocal encode_seconds
        began = time.thread_time()
        pending[number] = asyncio.get_running_loop().create_future()
        frame = _encode(message)
        encode_seconds += time.thread_time() - began
        core.receive(TO_ENGINE.decode(frame), reply)
        answer = await pending[number]
        del pending[number]
        return answer

    await ask(0, Load(0, str(path.resolve())))
    network = core.models[served.checkpoint.name, served.checkpoint.version].network
    sizes = network.sizes
    instant_pass = InstantPass(sizes.classes, [tuple(range(sizes.heads))] * sizes.layers)
    network.run = instant_pass.run  # type: ignore[method-assign, assignment]
    draw = np.random.default_rng(0)
    ids = draw.integers(1000, 20000, (size, TOKENS)).tolist()
    window = TokenColumns.of(ids)
    rule = served.checkpoint.rule("balanced")
    decided = served.decider.decide(window, rule)
    decided.steps[decided.steps == 0] = rule.path(0.5)[-1]  # step 0 needs no engine
    submission = Submission(
        served.checkpoint.name,
        served.checkpoint.version,
        Texts(window, window),
        "balanced",
        time.monotonic() + 3600,
        decided=decided,
    )
    numbers = iter(range(1, texts // size + 1))

    async def caller() -> None:
        for number in numbers:
            request = msgspec.structs.replace(message, id=number)
            assert isinstance(await ask(number, request), Answer)

    message, encode_seconds = request_of(submission), 0.0
    started = time.process_time()
    async with asyncio.TaskGroup() as tasks:
        work = tasks.create_task(core.run())
        callers = [tasks.create_task(caller()) for _ in range(IN_FLIGHT)]
        await asyncio.wait(callers)
        work.cancel()
    seconds = time.process_time() - started - instant_pass.seconds - encode_seconds
    return 1e6 * seconds / (texts // size * size)


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--texts", type=int, default=20000)
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    torch.set_num_threads(1)
    table = Table("texts per request", "us per text outside of passes", "min", "max")
    for size in SIZES:
        texts = given.texts if size > 1 else given.texts // 10
        times = sorted(asyncio.run(measure(given.model, texts, size)) for _ in range(given.repeats))
        table.add_row(str(size), *(f"{times[at]:.2f}" for at in (len(times) // 2, 0, -1)))
    Console().print(table)


if __name__ == "__main__":
    main()
