"""The checkpoints in the repository, and the answer of one of them in the README."""

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
AG_NEWS = ROOT / "model_store" / "ag_news" / "3"
STORE = read_store(ROOT / "model_store")
CHECKPOINTS = [c for versions in STORE.checkpoints.values() for c in versions]
each_checkpoint = pytest.mark.parametrize(
    "checkpoint", CHECKPOINTS, ids=[c.label for c in CHECKPOINTS]
)
README = (ROOT / "README.md").read_text()

SENTENCES = {
    "Sports": "The quarterback will miss the rest of the season with a knee injury.",
    "Business": "Shares fell sharply after the retailer cut its profit forecast for the quarter.",
    "Sci/Tech": "Researchers released new software that finds security holes in web browsers.",
    "World": "The prime minister met rebel leaders for peace talks in the capital on Sunday.",
}


@pytest.fixture(scope="module")
def classifier() -> Classifier:
    return Classifier(AG_NEWS)


def test_transformers_alone_gives_the_same_labels(classifier: Classifier) -> None:
    labelled = pipeline("text-classification", model=str(AG_NEWS), device="cpu")
    labelled.model.forward = partial(labelled.model.forward, steps=classifier.checkpoint.num_heads)
    texts = list(SENTENCES.values())
    answers = classifier(texts, heads=classifier.checkpoint.num_heads)
    assert [found["label"] for found in labelled(texts)] == [one.label for one in answers]
    assert {one.label for one in answers} == set(classifier.checkpoint.manifest.labels)


def test_no_checkpoint_in_the_store_is_broken() -> None:
    assert not STORE.errors
    assert "ag_news" in STORE.checkpoints


@each_checkpoint
def test_checkpoints_are_smaller_than_50_mb(checkpoint: Checkpoint) -> None:
    assert sum(path.stat().st_size for path in checkpoint.path.iterdir()) < 50e6


@each_checkpoint
def test_checkpoints_match_their_manifest(checkpoint: Checkpoint) -> None:
    checkpoint.verify()


@each_checkpoint
def test_checkpoints_have_a_card_with_a_plot(checkpoint: Checkpoint) -> None:
    card = (checkpoint.path / "README.md").read_text()
    (plot,) = re.findall(r"!\[.*\]\((.*)\)", card)
    assert (checkpoint.path / plot).read_bytes().startswith(b"\x89PNG")


@each_checkpoint
def test_the_recipe_file_beside_a_checkpoint_was_used(checkpoint: Checkpoint) -> None:
    path = checkpoint.path.parent / "recipe.toml"
    Recipe.read(path)
    stated = tomllib.loads(path.read_text())
    used = checkpoint.manifest.recipe
    assert {name: used[name] for name in stated} == stated


@each_checkpoint
def test_higher_levels_cost_more_and_are_more_accurate(checkpoint: Checkpoint) -> None:
    levels = checkpoint.manifest.named_levels
    fast, balanced, best = (levels[name] for name in ("fast", "balanced", "best"))
    assert fast.macs_share <= balanced.macs_share <= best.macs_share
    if checkpoint.config["budget_scope"] == "layer":
        return  # its layers decide separately, and its levels have no limits of cost
    cap, next_cap = checkpoint.manifest.recipe["level_costs"]
    assert fast.macs_share <= cap
    assert fast.macs_share < balanced.macs_share <= next_cap
    assert fast.accuracy is not None
    assert balanced.accuracy is not None
    assert best.accuracy is not None
    assert fast.accuracy < balanced.accuracy <= best.accuracy


@pytest.mark.parametrize("label", SENTENCES)
@pytest.mark.parametrize("quality", ["fast", "balanced", "best"])
def test_simple_sentences_are_classified_correctly(
    classifier: Classifier, label: str, quality: str
) -> None:
    (answer,) = classifier([SENTENCES[label]], quality=quality)
    assert answer.label == label


def test_the_readme_shows_the_actual_answer(classifier: Classifier) -> None:
    (request,) = re.findall(r"-d '(\{.*?\})'", README)
    (shown,) = re.findall(r"```json\n(.*?)```", README, flags=re.DOTALL)
    (item,) = json.loads(shown)["data"]
    (answer,) = classifier([json.loads(request)["input"]])
    assert item["label"] == answer.label
    assert item["probs"] == pytest.approx(answer.probs, rel=1e-4)
    assert (item["macs"], item["dense_macs"]) == (answer.macs, answer.dense_macs)
    assert (item["heads"]["used"], item["heads"]["budget"]) == (answer.heads, answer.budget)
