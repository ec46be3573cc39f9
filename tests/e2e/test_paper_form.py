"""The shipped model of the paper's architecture, served: f_o and g_d decide in every layer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.processes import Server, server

pytestmark = pytest.mark.timeout(300)

STORE = Path(__file__).parents[2] / "model_store"
NAME, LAYERS, HEADS = "paper_ag_news", 4, 8
SENTENCES = {
    "Sports": "The striker scored twice and the team won the cup final after extra time.",
    "Business": "Shares of the airline fell after it cut its profit forecast for the quarter.",
    "Sci/Tech": "Microsoft released new software that finds security holes in web browsers.",
    "World": "Iraqi police said a bomb killed four soldiers in Baghdad on Sunday.",
}


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("paper")
    with server(STORE, folder, engines=1, models=NAME, default_model=NAME) as running:
        yield running


def ask(running: Server, **fields: Any) -> list[dict[str, Any]]:
    body = {"input": list(SENTENCES.values()), "return_heads": True} | fields
    response = httpx.post(f"{running.url}/classify", json=body, timeout=60)
    assert response.status_code == 200
    return list(response.json()["data"])


def test_plain_sentences_are_classified_correctly(running: Server) -> None:
    assert [item["label"] for item in ask(running)] == list(SENTENCES)


def test_f_o_decides_the_number_of_heads_by_layer_and_text(running: Server) -> None:
    plans = [item["heads"]["per_layer"] for item in ask(running)]
    counts = [tuple(map(len, plan)) for plan in plans]
    assert all(len(plan) == LAYERS and min(plan) >= 1 for plan in counts)
    assert any(len(set(plan)) > 1 for plan in counts)  # layers of one text differ
    assert len(set(counts)) > 1  # and so do texts


def test_g_d_selects_different_heads_for_different_texts(running: Server) -> None:
    plans = [item["heads"]["per_layer"] for item in ask(running)]
    chosen = {
        (layer, len(plan[layer]), tuple(plan[layer])) for plan in plans for layer in range(LAYERS)
    }
    of_one_size = {(layer, size) for layer, size, heads in chosen if size < HEADS}
    assert len({entry for entry in chosen if entry[1] < HEADS}) > len(of_one_size)


def test_multiply_adds_follow_the_heads(running: Server) -> None:
    decided, full = ask(running), ask(running, heads=HEADS)
    for item, all_heads in zip(decided, full, strict=True):
        assert item["heads"]["used"] == sum(map(len, item["heads"]["per_layer"]))
        assert item["heads"]["used"] < all_heads["heads"]["used"] == LAYERS * HEADS
        assert item["macs"] < all_heads["macs"]
        assert item["heads"]["predicted"] is None  # no step is decided before the pass


def test_the_card_has_the_quality_levels(running: Server) -> None:
    card = httpx.get(f"{running.url}/models/{NAME}").json()
    assert set(card["quality_levels"]) == {"fast", "balanced", "best"}
