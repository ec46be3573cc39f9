from __future__ import annotations

from pathlib import Path

import pytest

from budgetformer.checkpoint.store import read_checkpoint
from budgetformer.classifier import Classifier
from loadtests.answers import QUALITIES, reference
from tests.support.stores import CHAINED, TOPICS, labelled_sentences, model_store

__all__ = ["model_store"]


@pytest.mark.parametrize("name", [f"{TOPICS}/2", f"{CHAINED}/1"])
def test_the_reference_decides_as_the_classifier(
    model_store: Path, tmp_path: Path, name: str
) -> None:
    texts = [text for text, _ in labelled_sentences()]
    right = reference(read_checkpoint(model_store / name), texts, tmp_path)
    classifier = Classifier(model_store / name, precision="float32")
    for place, quality in enumerate(QUALITIES):
        for i, found in enumerate(classifier(texts, quality=quality)):
            if i % len(QUALITIES) == place and right.margins[i] > 1e-4:
                assert right.steps[i] == found.budget
                assert right.probs[i] == pytest.approx(found.probs, abs=1e-5)
    assert (right.margins > 1e-4).mean() > 0.8
    assert len(set(right.steps.tolist())) > 2
