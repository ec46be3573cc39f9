"""The shipped model in the paper's own form, served: f_o and g_d decide in every layer."""

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
    with server(STORE, folder, engines=1, models=NAME, default_model=NAME) as it:
        yield it


def ask(running: Server, **fields: Any) -> list[dict[str, Any]]:
    body = {"input": list(SENTENCES.values()), "return_heads": True} | fields
    response = httpx.post(f"{running.url}/classify", json=body, timeout=60)
    assert response.status_code == 200
    return list(response.json()["data"])


def test_it_knows_plain_sentences(running: Server) -> None:
    assert [item["label"] for item in ask(running)] == list(SENTENCES)


def test_f_o_gives_each_layer_of_each_text_a_number_of_heads(running: Server) -> None:
    plans = [item["heads"]["per_layer"] for item in ask(running)]
    counts = [tuple(map(len, plan)) for plan in plans]
    assert all(len(plan) == LAYERS and min(plan) >= 1 for plan in counts)
    assert any(len(set(plan)) > 1 for plan in counts)  # layers of one text differ
    assert len(set(counts)) > 1  # and so do texts


def test_g_d_chooses_other_heads_for_other_texts(running: Server) -> None:
    plans = [item["heads"]["per_layer"] for item in ask(running)]
    chosen = {
        (layer, len(plan[layer]), tuple(plan[layer])) for plan in plans for layer in range(LAYERS)
    }
    of_one_size = {(layer, size) for layer, size, heads in chosen if size < HEADS}
    assert len({entry for entry in chosen if entry[1] < HEADS}) > len(of_one_size)


def test_multiply_adds_follow_the_heads(running: Server) -> None:
    decided, full = ask(running), ask(running, heads=HEADS)
    for own, all_heads in zip(decided, full, strict=True):
        assert own["heads"]["used"] == sum(map(len, own["heads"]["per_layer"]))
        assert own["heads"]["used"] < all_heads["heads"]["used"] == LAYERS * HEADS
        assert own["macs"] < all_heads["macs"]
        assert own["heads"]["predicted"] is None  # no step is known before the pass


def test_its_card_has_its_levels(running: Server) -> None:
    card = httpx.get(f"{running.url}/models/{NAME}").json()
    assert set(card["quality_levels"]) == {"fast", "balanced", "best"}
