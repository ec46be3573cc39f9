"""The reference answers of the load test."""

from __future__ import annotations

from pathlib import Path

import pytest

from budgetformer.checkpoint.store import read_checkpoint
from budgetformer.classifier import Classifier
from loadtests.answers import QUALITIES, reference
from tests.support.stores import CHAINED, TOPICS, labelled_sentences, model_store

__all__ = ["model_store"]


@pytest.mark.parametrize("name", [f"{TOPICS}/2", f"{CHAINED}/1"])
def test_the_reference_answers_equal_the_classifier(
    model_store: Path, tmp_path: Path, name: str
) -> None:
    texts = [text for text, _ in labelled_sentences()]
    expected = reference(read_checkpoint(model_store / name), texts, tmp_path)
    classifier = Classifier(model_store / name, precision="float32")
    for remainder, quality in enumerate(QUALITIES):
        for i, answer in enumerate(classifier(texts, quality=quality)):
            if i % len(QUALITIES) == remainder and expected.margins[i] > 1e-4:
                assert expected.steps[i] == answer.budget
                assert expected.probs[i] == pytest.approx(answer.probs, abs=1e-5)
    assert (expected.margins > 1e-4).mean() > 0.8
    assert len(set(expected.steps.tolist())) > 2
