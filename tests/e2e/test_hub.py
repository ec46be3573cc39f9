"""A classifier of the Hugging Face hub is served under its id, without a folder."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest
import torch
from transformers import AutoModelForSequenceClassification, pipeline

from budgetformer.checkpoint.store import read_checkpoint
from tests.support.classifiers import TEXTS, save_classifier
from tests.support.hub import hub_of
from tests.support.processes import server

pytestmark = pytest.mark.timeout(300)


@pytest.mark.parametrize("weights", ["model.safetensors", "pytorch_model.bin"])
def test_a_classifier_of_the_hub_is_served_by_its_id(tmp_path: Path, weights: str) -> None:
    folder = save_classifier(tmp_path / "made")
    classify = pipeline("text-classification", model=str(folder))
    expected = classify(TEXTS[0])[0]
    if weights.endswith(".bin"):
        model = AutoModelForSequenceClassification.from_pretrained(folder)
        torch.save(model.state_dict(), folder / weights)
        (folder / "model.safetensors").unlink()
    (folder / "onnx").mkdir()
    (folder / "onnx" / "model.onnx").write_bytes(b"not needed")
    (folder / "modeling_own.py").write_text("raise RuntimeError")
    store = tmp_path / "store"
    with hub_of(folder, "some-team/their-model") as (url, downloads):
        environment = {"HF_ENDPOINT": url, "HF_HOME": str(tmp_path / "cache")}
        source = "some-team/their-model"
        with server(store, tmp_path, engines=1, environment=environment, model=source) as running:
            request = {"model": "their-model", "input": TEXTS[0]}
            answer = httpx.post(f"{running.url}/classify", json=request, timeout=30)
            item = answer.raise_for_status().json()["data"][0]
    assert item["label"] == expected["label"]
    assert item["score"] == pytest.approx(expected["score"], abs=1e-4)
    assert weights in downloads
    assert not {"onnx/model.onnx", "modeling_own.py"} & set(downloads)
    provenance = read_checkpoint(store / "their-model" / "1").manifest.provenance
    assert provenance.starting_weights == "some-team/their-model"
