"""A checkpoint with a chain of several steps and one threshold per level, through HTTP."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from budgetformer.checkpoint.loading import load_network
from budgetformer.checkpoint.store import Checkpoint, read_checkpoint
from tests.support.counter import step_macs
from tests.support.serving import Service, service
from tests.support.stores import CHAIN, CHAINED, HEADS, labelled_sentences

pytestmark = pytest.mark.asyncio(loop_scope="session")

TEXTS = [text for text, _ in labelled_sentences()]
LEVELS = ("fast", "balanced", "best")
NUMBERS = (100, 4, 3.5, 3, 2.5, 2, 1.5, 1, 0.75, 0.5, 0.25, 0)
"""Qualities in points of accuracy given up, from the cheapest to the most expensive."""


@pytest.fixture(scope="module")
def chained(model_store: Path) -> Checkpoint:
    return read_checkpoint(model_store / CHAINED / "1")


async def ask(to: Service, **fields: Any) -> list[dict[str, Any]]:
    """Classify all sentences, in requests of at most 60."""
    items: list[dict[str, Any]] = []
    for start in range(0, len(TEXTS), 60):
        answer = await to.answer(TEXTS[start : start + 60], model=CHAINED, **fields)
        items += answer["data"]
    return items


def steps(item: dict[str, Any]) -> list[int]:
    return list(item["heads"]["steps"])


async def test_no_text_costs_less_at_a_higher_level(shared: Service) -> None:
    levels = [await ask(shared, quality=level) for level in LEVELS]
    every_head = await ask(shared, heads=HEADS)
    for ways in zip(*levels, every_head, strict=True):
        *chosen, full = ways
        for low, high in pairwise(chosen):
            assert steps(low) == steps(high)[: len(steps(low))]
            assert low["macs"] <= high["macs"]
        assert chosen[-1]["macs"] <= full["macs"]
    seen = {tuple(steps(item)) for items in levels for item in items}
    assert seen == {(0,), (0, 1), (0, 2), (0, 1, 2)}


async def test_lower_numbers_raise_cost_and_threshold_gradually(
    shared: Service, chained: Checkpoint
) -> None:
    items = [await ask(shared, quality=points) for points in NUMBERS]
    for ways in zip(*items, strict=True):
        for low, high in pairwise(ways):
            assert steps(low) == steps(high)[: len(steps(low))]
            assert low["macs"] <= high["macs"]
    for points, answered in zip(NUMBERS, items, strict=True):
        level = chained.rule(points).level
        assert level is not None
        for item in answered:
            assert item["quality"] == points
            assert steps(item)[-1] == CHAIN[-1] or item["score"] >= level.threshold
    means = [sum(item["macs"] for item in answered) for answered in items]
    assert len(set(means)) > len(LEVELS)


async def test_answers_contain_the_steps_and_the_prediction_of_f_o(
    shared: Service, chained: Checkpoint
) -> None:
    network = load_network(chained, "cpu", "float32")
    for level in LEVELS:
        for item in await ask(shared, quality=level):
            heads, ran = item["heads"], steps(item)
            assert ran[0] == 0
            assert ran == sorted(set(ran))
            assert heads["budget"] == ran[-1]
            assert heads["predicted"] == (ran[1] if len(ran) > 1 else 0)
            assert heads["used"] == sum(sum(network.config.heads_per_layer(k)) for k in ran if k)
            assert item["macs"] == step_macs(network.config, ran, item["tokens"])


async def test_max_heads_shortens_the_chain(shared: Service) -> None:
    for item in await ask(shared, quality="best", max_heads=1):
        assert steps(item) == [0, 1]
    for item in await ask(shared, quality="best", max_heads=0):
        assert (steps(item), item["heads"]["predicted"]) == ([0], 0)


async def test_the_shares_of_final_steps_are_those_of_calibration(
    shared: Service, chained: Checkpoint
) -> None:
    for level in LEVELS:
        counts = Counter(item["heads"]["budget"] for item in await ask(shared, quality=level))
        shares = {step: count / len(TEXTS) for step, count in counts.items()}
        assert shares == pytest.approx(dict(chained.manifest.named_levels[level].budgets))


@pytest.mark.parametrize("quality", ["balanced", 1.5, 0.4])
async def test_the_expected_items_in_metrics_come_from_calibration(
    model_store: Path, chained: Checkpoint, quality: str | float
) -> None:
    async with service(model_store, models=[CHAINED], default_model=CHAINED) as own:
        counts = Counter(str(item["heads"]["budget"]) for item in await ask(own, quality=quality))
        metrics = await own.scrape()
    assert metrics.by("budget", "items_total", model=CHAINED) == dict(counts)
    shares = chained.rule(quality).expected_budgets() or {}
    expected = {str(step): share * len(TEXTS) for step, share in shares.items() if share}
    assert metrics.by("budget", "items_expected_total", model=CHAINED) == pytest.approx(expected)


async def test_kserve_answers_contain_the_steps(shared: Service) -> None:
    text = {"name": "text", "shape": [20, 1], "datatype": "BYTES", "data": TEXTS[:20]}
    body = {"inputs": [text], "parameters": {"quality": "best"}}
    response = await shared.client.post(f"/v2/models/{CHAINED}/infer", json=body)
    outputs = {one["name"]: one for one in response.json()["outputs"]}
    items = (await ask(shared, quality="best"))[:20]
    assert outputs["predicted"]["data"] == [item["heads"]["predicted"] for item in items]
    assert outputs["steps"]["shape"] == [20, HEADS + 1]
    assert outputs["steps"]["data"] == [
        step in steps(item) for item in items for step in range(HEADS + 1)
    ]
