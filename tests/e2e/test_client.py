"""The Python client with a real server: equal results, options, errors, and the pipeline's API."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import pipeline

import budgetformer
from budgetformer.client import (
    AsyncClient,
    Classification,
    Client,
    DeadlineExceededError,
    ServerError,
)
from tests.support.processes import Server
from tests.support.stores import HEADS, LABELS, LAYERS, PAIRS, TOPICS, labelled_sentences

pytestmark = pytest.mark.timeout(300)

ROWS = labelled_sentences()
TEXTS = [text for text, _ in ROWS]


@pytest.fixture
def client(running: Server) -> Iterator[Client]:
    with Client(running.url, batch_items=10) as connected:
        yield connected


def classifications(results: Any) -> list[Classification]:
    assert all(isinstance(result, Classification) for result in results)
    return list(results)


def test_answers_are_right_and_in_order(client: Client) -> None:
    results = classifications(client.classify(TEXTS, quality="best"))
    right = sum(result.label == label for result, (_, label) in zip(results, ROWS, strict=True))
    assert right > 0.9 * len(ROWS)
    assert [result.index for result in results] == list(range(len(ROWS)))
    assert {result.model for result in results} == {"topics:2"}


async def test_the_asynchronous_client_gets_the_same_answers(
    running: Server, client: Client
) -> None:
    expected = classifications(client.classify(TEXTS, heads=2, return_heads=True))
    async with AsyncClient(running.url, batch_items=7) as other:
        results = classifications(await other.classify(TEXTS, heads=2, return_heads=True))
    for one, two in zip(results, expected, strict=True):
        assert (one.label, one.heads, one.budget) == (two.label, 2 * LAYERS, 2)
        assert one.probs == pytest.approx(two.probs, rel=1e-4)
        assert one.per_layer == ((0, 1),) * LAYERS


def test_options_are_sent_to_the_server(client: Client) -> None:
    (result,) = classifications(
        client.classify(TEXTS[0], top_k=2, use_activation=False, quality="fast")
    )
    assert len(result.labels) == 2
    powers = [math.exp(logit) for logit in result.probs]
    assert max(powers) / sum(powers) == pytest.approx(result.score)
    assert (result.budget, result.quality) == (0, "fast")
    (pair,) = classifications(client.classify(("The otter slept.", "A choir sang."), model=PAIRS))
    assert pair.model == "pairs:1"


def test_errors_of_the_server_have_types(client: Client) -> None:
    with pytest.raises(ServerError, match="no model 'nothing'") as caught:
        client.classify("a", model="nothing")
    assert (caught.value.status, caught.value.code) == (404, "unknown_model")
    with pytest.raises(ServerError) as caught:
        client.classify([*TEXTS[:25], "the otter slept " * 30], truncate=False)
    assert caught.value.param == "input[25]"
    with pytest.raises(DeadlineExceededError):
        client.classify(TEXTS, timeout=1e-9)


def test_models_and_their_cards_can_be_read(client: Client) -> None:
    assert {TOPICS, PAIRS} <= set(client.models())
    card = client.model(TOPICS)
    assert (card["labels"], card["version"]) == (list(LABELS), 2)
    with pytest.raises(ServerError):
        client.model("nothing")


@pytest.fixture(scope="module")
def original(model_store: Path) -> Any:
    """Return Transformers' pipeline for the same checkpoint, with all heads."""
    assert budgetformer.__version__  # importing the package registers the architecture
    folder = str(model_store / TOPICS / "2")
    made = pipeline("text-classification", model=folder, device="cpu", dtype=torch.float32)
    made.model.forward = partial(made.model.forward, steps=HEADS)
    return made


@pytest.mark.parametrize(
    ("inputs", "options"),
    [
        (TEXTS[0], {}),
        (TEXTS[0], {"top_k": 1}),
        (TEXTS[0], {"top_k": None}),
        (TEXTS[:4], {}),
        (TEXTS[:4], {"top_k": 2}),
        (TEXTS[:4], {"top_k": None, "function_to_apply": "sigmoid"}),
        (TEXTS[:4], {"top_k": None, "function_to_apply": "none"}),
        (TEXTS[:4], {"function_to_apply": "softmax"}),
        ({"text": TEXTS[0]}, {}),
        ({"text": TEXTS[0]}, {"top_k": 2}),
        ([{"text": TEXTS[0]}, {"text": TEXTS[1]}], {}),
    ],
    ids=range(11),
)
def test_calling_the_client_answers_like_the_pipeline(
    client: Client, original: Any, inputs: Any, options: dict[str, Any]
) -> None:
    expected = original(inputs, **options)
    assert _rounded(client(inputs, heads=HEADS, **options)) == _rounded(expected)


def _rounded(part: Any) -> Any:
    if isinstance(part, dict):
        return {key: _rounded(value) for key, value in part.items()}
    if isinstance(part, list):
        return [_rounded(value) for value in part]
    return pytest.approx(part, rel=1e-3) if isinstance(part, float) else part
