"""The checkpoints that come with the project, and what the README says of one of them."""

from __future__ import annotations

import json
import re
import tomllib
from functools import partial
from pathlib import Path

import pytest
from transformers import pipeline

from budgetformer.checkpoint.store import Checkpoint, read_store
from budgetformer.classifier import Classifier
from budgetformer.training.recipe import Recipe

ROOT = Path(__file__).parents[2]
SHIPPED = ROOT / "model_store" / "ag_news" / "3"
STORE = read_store(ROOT / "model_store")
CHECKPOINTS = [c for versions in STORE.checkpoints.values() for c in versions]
each = pytest.mark.parametrize("checkpoint", CHECKPOINTS, ids=[c.label for c in CHECKPOINTS])
README = (ROOT / "README.md").read_text()

SENTENCES = {
    "Sports": "The quarterback will miss the rest of the season with a knee injury.",
    "Business": "Shares fell sharply after the retailer cut its profit forecast for the quarter.",
    "Sci/Tech": "Researchers released new software that finds security holes in web browsers.",
    "World": "The prime minister met rebel leaders for peace talks in the capital on Sunday.",
}


@pytest.fixture(scope="module")
def classifier() -> Classifier:
    return Classifier(SHIPPED)


def test_plain_transformers_gives_the_same_labels(classifier: Classifier) -> None:
    labelled = pipeline("text-classification", model=str(SHIPPED), device="cpu")
    labelled.model.forward = partial(labelled.model.forward, steps=classifier.checkpoint.num_heads)
    texts = list(SENTENCES.values())
    answers = classifier(texts, heads=classifier.checkpoint.num_heads)
    assert [found["label"] for found in labelled(texts)] == [one.label for one in answers]
    assert {one.label for one in answers} == set(classifier.checkpoint.manifest.labels)


def test_nothing_in_the_store_is_broken() -> None:
    assert not STORE.errors
    assert "ag_news" in STORE.checkpoints


@each
def test_it_is_small_enough_to_live_in_the_repository(checkpoint: Checkpoint) -> None:
    assert sum(path.stat().st_size for path in checkpoint.path.iterdir()) < 50e6


@each
def test_it_is_what_its_manifest_says(checkpoint: Checkpoint) -> None:
    checkpoint.verify()


@each
def test_it_has_a_card_with_its_plot(checkpoint: Checkpoint) -> None:
    card = (checkpoint.path / "README.md").read_text()
    (plot,) = re.findall(r"!\[.*\]\((.*)\)", card)
    assert (checkpoint.path / plot).read_bytes().startswith(b"\x89PNG")


@each
def test_its_recipe_is_the_one_beside_it(checkpoint: Checkpoint) -> None:
    path = checkpoint.path.parent / "recipe.toml"
    Recipe.read(path)
    stated = tomllib.loads(path.read_text())
    used = checkpoint.manifest.recipe
    assert {name: used[name] for name in stated} == stated


@each
def test_its_levels_cost_more_and_reach_more(checkpoint: Checkpoint) -> None:
    levels = checkpoint.manifest.named_levels
    fast, balanced, best = (levels[name] for name in ("fast", "balanced", "best"))
    assert fast.macs_share <= balanced.macs_share <= best.macs_share
    if checkpoint.config["budget_scope"] == "layer":
        return  # its layers decide for themselves, and no level has a cost to keep to
    cap, next_cap = checkpoint.manifest.recipe["level_costs"]
    assert fast.macs_share <= cap
    assert fast.macs_share < balanced.macs_share <= next_cap
    assert fast.accuracy is not None
    assert balanced.accuracy is not None
    assert best.accuracy is not None
    assert fast.accuracy < balanced.accuracy <= best.accuracy


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
