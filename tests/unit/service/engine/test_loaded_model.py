"""The weights that an engine packs while it loads a model, and their precision."""

from __future__ import annotations

from pathlib import Path

import pytest

from budgetformer.checkpoint.loading import load_network
from budgetformer.checkpoint.store import Checkpoint, read_checkpoint
from budgetformer.inference.packed import PackedPass
from service.engine import loaded_model as models
from service.engine.loaded_model import load_model


def test_the_steps_of_all_levels_are_packed(model_store: Path) -> None:
    path = model_store / "topics" / "1"
    checkpoint = read_checkpoint(path)
    rules = [checkpoint.rule(name) for name in checkpoint.manifest.named_levels]
    steps = {step for rule in rules for step in rule.chain}
    steps |= {band.step for rule in rules for band in rule.entry}
    network = load_model(path, "cpu", "float32", {}).network
    packed = {heads for layer, heads, _ in network._slices._slices if layer == 0}
    wanted = {tuple(range(network.config.heads_per_layer(step)[0])) for step in steps - {0}}
    assert packed == wanted - {()}


def test_warm_up_steps_of_a_model_replace_those_of_its_levels(model_store: Path) -> None:
    path = model_store / "topics" / "1"
    steps = {"topics": [1, 99], "tags": [2]}
    network = load_model(path, "cpu", "float32", {}, warm_up_steps=steps).network
    packed = {heads for layer, heads, _ in network._slices._slices if layer == 0}
    assert packed == {tuple(range(network.config.heads_per_layer(1)[0]))}


def test_engines_that_share_weights_use_the_precision_timed_first(
    model_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    precisions: list[str] = []

    def load(checkpoint: Checkpoint, device: str, precision: str) -> PackedPass:
        precisions.append(precision)
        return load_network(checkpoint, device, "bfloat16" if precision == "fastest" else "float32")

    monkeypatch.setattr(models, "load_network", load)
    path = model_store / "topics" / "1"
    for _ in range(2):
        models._load(read_checkpoint(path), "cpu", "fastest", tmp_path)
    assert precisions == ["fastest", "bfloat16"]
    models._load(read_checkpoint(path), "cpu", "fastest", None)
    models._load(read_checkpoint(path), "cpu", "auto", tmp_path)
    assert precisions[2:] == ["fastest", "auto"]
