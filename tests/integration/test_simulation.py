"""The simulated engine compared with the real one."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from budgetformer.checkpoint.store import read_checkpoint
from service.ipc.engine_messages import BatchReport, ToFrontend
from service.settings import Settings
from service.simulation.costs import EngineCost
from service.simulation.engine import SimEngine, SimModel, SimRequest
from service.simulation.texts import measure_texts
from tests.support.serving import Service, held, service
from tests.support.stores import CHAINED, LABELS, TOPICS, sentences
from tests.support.waiting import until


@pytest.mark.parametrize("name", [TOPICS, CHAINED])
async def test_the_simulated_engine_forms_the_batches_of_the_real_one(
    model_store: Path, name: str
) -> None:
    async with service(model_store, models=[name], default_model=name) as running:
        await compare(running)


async def compare(fresh: Service) -> None:
    core = fresh.core
    (model,) = core.models.values()
    words = [sentence for label in LABELS for sentence in sentences(label)[:9]]
    texts = dict(
        zip(words, measure_texts(read_checkpoint(model.checkpoint.path), words).texts, strict=True)
    )
    # The first text occupies the device while single texts and a large request wait.
    hard = [word for word in words if texts[word].steps["best"]]
    requested_texts = [
        [hard[0]],
        *([word] for word in hard[1:9]),
        [w for w in words if w not in hard[:9]],
    ]

    real: list[tuple[int, int]] = []
    say = core.broadcast

    def record(message: ToFrontend) -> None:
        if isinstance(message, BatchReport) and message.budget:
            real.append((message.budget, message.items))
        say(message)

    core.broadcast = record
    with held(core):
        asking = []
        done = 0
        for some in requested_texts:
            asking.append(asyncio.create_task(fresh.answer(some, quality="best")))
            done += sum(word in hard for word in some)
            await until(lambda done=done: fresh.in_flight() == done, "the request")
    await asyncio.gather(*asking)

    settings = Settings(quality="best")
    engine = SimEngine(
        SimModel.of(model.checkpoint, model.costs), settings, EngineCost(), lambda _: None
    )
    now, simulated = 0.0, []
    requests = [
        SimRequest(n / 1000, 10.0, [texts[w] for w in some])
        for n, some in enumerate(requested_texts)
    ]
    for request in requests:
        request.level = engine.level(0.0)
    assert engine.receive(requests[0], 0.0) is None
    took = engine.begin(0.0)
    for request in requests[1:]:
        assert engine.receive(request, request.arrived) is None
    while took is not None:
        now += took
        simulated.append((engine.step, sum(map(len, engine.running))))
        engine.finish(now)
        took = engine.begin(now)
    assert real == simulated
    assert len({step for step, _ in real}) > 1
