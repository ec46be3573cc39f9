"""Deciders loaded from a checkpoint without torch: equal decisions, shared tables, checks."""

from __future__ import annotations

import gc
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from budgetformer.checkpoint.deciding import load_decider
from budgetformer.checkpoint.loading import load_network
from budgetformer.checkpoint.manifest import WEIGHTS
from budgetformer.checkpoint.store import load_encoder, read_checkpoint
from budgetformer.errors import CheckpointError
from budgetformer.inference import cascade
from budgetformer.inference.cascade import Batch, Items, Part
from budgetformer.inference.texts import Texts
from budgetformer.subprocesses import python_command
from tests.support.stores import CHAINED, TOPICS, labelled_sentences, sign

TEXTS = [text for text, _ in labelled_sentences()]


@pytest.mark.parametrize("model", [f"{CHAINED}/1", f"{TOPICS}/2", "tags/1", "pairs/1"])
@pytest.mark.parametrize("shares", [False, True])
def test_decisions_equal_those_of_the_network(
    model_store: Path, tmp_path: Path, model: str, shares: bool
) -> None:
    checkpoint = read_checkpoint(model_store / model)
    decider = load_decider(checkpoint, tmp_path if shares else None)
    assert decider is not None
    network = load_network(checkpoint)
    texts = Texts.of(load_encoder(checkpoint).encode(TEXTS))
    for quality in ("fast", "balanced", "best", 1.5) if checkpoint.calibrated else (None,):
        rule = checkpoint.rule(quality)
        items = Items(network, texts, rule)
        cascade.decide(network, Batch([Part(items, list(range(len(items))))]))
        decided = decider.decide(texts.full_text, rule)
        assert decided.steps.tolist() == items.step.tolist()
        assert decided.exit_logits is not None
        assert np.abs(decided.exit_logits - items.exit_logits).max() < 1e-6


def test_tables_are_mapped_from_one_file(model_store: Path, tmp_path: Path) -> None:
    checkpoint = read_checkpoint(model_store / CHAINED / "1")
    first, second = (load_decider(checkpoint, tmp_path) for _ in range(2))
    assert first is not None
    assert second is not None
    mapped = [
        line.split()[4]
        for line in Path("/proc/self/maps").read_text().splitlines()
        if "-step0" in line
    ]
    assert len(mapped) == 2
    assert len(set(mapped)) == 1


def test_unused_tables_are_released(model_store: Path, tmp_path: Path) -> None:
    checkpoint = read_checkpoint(model_store / CHAINED / "1")
    deciders = [load_decider(checkpoint, tmp_path) for _ in range(2)]
    (link,) = tmp_path.glob("*-step0")
    assert link.exists()
    deciders.pop()
    gc.collect()
    assert link.exists()
    deciders.pop()
    gc.collect()
    assert not link.is_symlink()
    assert "-step0" not in Path("/proc/self/maps").read_text()


def test_mapped_tables_are_read_only(model_store: Path, tmp_path: Path) -> None:
    decider = load_decider(read_checkpoint(model_store / CHAINED / "1"), tmp_path)
    assert decider is not None
    assert decider.step0 is not None
    with pytest.raises(ValueError, match="read-only"):
        decider.step0.table[0, 0] = 1


@pytest.fixture
def folder(model_store: Path, tmp_path: Path) -> Path:
    """Return the folder of a copied checkpoint, for a test to change."""
    return shutil.copytree(model_store / CHAINED / "1", tmp_path / CHAINED / "1")


def test_a_changed_file_is_refused(folder: Path) -> None:
    path = folder / WEIGHTS
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="sha256"):
        load_decider(read_checkpoint(folder))


@pytest.mark.parametrize("name", ["exit_head.table", "encoder.decision.controller.out.bias"])
def test_a_missing_or_misshapen_tensor_is_named(folder: Path, name: str) -> None:
    weights = load_file(folder / WEIGHTS)
    for changed in (weights[name][:-1].clone(), None):
        weights.pop(name)
        if changed is not None:
            weights[name] = changed
        save_file(weights, folder / WEIGHTS)
        sign(folder)
        with pytest.raises(CheckpointError, match=name.rpartition(".")[2]):
            load_decider(read_checkpoint(folder))


def test_torch_is_not_imported(model_store: Path) -> None:
    program = (
        "import sys; from pathlib import Path;"
        "from budgetformer.checkpoint.deciding import load_decider;"
        "from budgetformer.checkpoint.store import read_checkpoint;"
        f"assert load_decider(read_checkpoint(Path({str(model_store / CHAINED / '1')!r})));"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run(python_command("-c", program), check=True)
