"""What an engine lays out as it loads a model."""

from __future__ import annotations

from pathlib import Path

from budgetformer.checkpoint import read_checkpoint
from service.engine.models import load_model


def test_steps_that_levels_use_are_laid_out(model_store: Path) -> None:
    path = model_store / "topics" / "1"
    checkpoint = read_checkpoint(path)
    points = [p for p in checkpoint.manifest.operating_points if p.name]
    steps = {band.step for p in points for band in p.entry}
    steps |= {p.escalation.step for p in points if p.escalation}
    network = load_model(path, "cpu", "float32", {}).network
    laid_out = {heads for layer, heads, _ in network._slices._slices if layer == 0}
    wanted = {tuple(range(network.config.heads_per_layer(step)[0])) for step in steps - {0}}
    assert laid_out == wanted - {()}
