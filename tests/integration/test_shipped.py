"""The checkpoint that comes with the project, and what the README says of it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from budgetformer.classifier import Classifier

ROOT = Path(__file__).parents[2]
SHIPPED = ROOT / "model_store" / "ag_news" / "1"
README = (ROOT / "README.md").read_text()

SENTENCES = {
    "Sports": "The goalkeeper saved two penalties and the visitors won the cup after extra time.",
    "Business": "Shares fell sharply after the retailer cut its profit forecast for the quarter.",
    "Sci/Tech": "Researchers released new software that finds security holes in web browsers.",
    "World": "The prime minister met rebel leaders for peace talks in the capital on Sunday.",
}


@pytest.fixture(scope="module")
def classifier() -> Classifier:
    return Classifier(SHIPPED)


def test_it_is_small_enough_to_live_in_the_repository() -> None:
    assert (SHIPPED / "model.safetensors").stat().st_size < 50e6


def test_it_has_a_card_with_its_plot() -> None:
    card = (SHIPPED / "README.md").read_text()
    (plot,) = re.findall(r"!\[.*\]\((.*)\)", card)
    assert (SHIPPED / plot).read_bytes().startswith(b"\x89PNG")


def test_its_levels_cost_more_and_reach_more(classifier: Classifier) -> None:
    points = {p.name: p for p in classifier.checkpoint.manifest.operating_points if p.name}
    fast, balanced, best = (points[name] for name in ("fast", "balanced", "best"))
    assert fast.macs_share < balanced.macs_share <= 0.3 < best.macs_share
    assert fast.accuracy < balanced.accuracy <= best.accuracy
    assert len({step for p in points.values() for step in p.budgets}) >= 5


@pytest.mark.parametrize("label", SENTENCES)
@pytest.mark.parametrize("quality", ["fast", "balanced", "best"])
def test_it_knows_plain_sentences(classifier: Classifier, label: str, quality: str) -> None:
    (answer,) = classifier([SENTENCES[label]], quality=quality)
    assert answer.label == label


def test_the_readme_shows_its_real_answer(classifier: Classifier) -> None:
    (asked,) = re.findall(r"-d '(\{.*?\})'", README)
    (shown,) = re.findall(r"```json\n(.*?)```", README, flags=re.DOTALL)
    (item,) = json.loads(shown)["data"]
    (answer,) = classifier([json.loads(asked)["input"]])
    assert item["label"] == answer.label
    assert item["probs"] == pytest.approx(answer.probs, rel=1e-4)
    assert (item["macs"], item["dense_macs"]) == (answer.macs, answer.dense_macs)
    assert (item["heads"]["used"], item["heads"]["budget"]) == (answer.heads, answer.budget)
