"""Training in several processes gives the network of one process, written once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from budgetformer.checkpoint.store import read_checkpoint
from budgetformer.errors import DataError
from budgetformer.training.pipeline import train_tokenizer
from budgetformer.training.processes import SINGLE_PROCESS, join_processes
from tests.support.stores import single_label_rows, write_jsonl
from tests.support.texts import topic_examples
from tests.support.trained_together import train

LAUNCH = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m")


def launch(*arguments: object) -> str:
    """Run a module in two processes, and return its output."""
    command = [*LAUNCH, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_two_processes_train_the_network_of_one_process(tmp_path: Path) -> None:
    tokenizer = tmp_path / "tokenizer.json"
    train_tokenizer(topic_examples().texts, 150).save(str(tokenizer))
    expected = train(tmp_path / "one", tokenizer)
    launch("tests.support.trained_together", tmp_path / "two", tokenizer, tmp_path / "out")
    first, second = (load_file(tmp_path / f"out.{index}") for index in range(2))
    for name, weight in expected.items():
        assert torch.equal(first[name], second[name])
        # Answers do not depend on the bias of keys; only rounding errors change it.
        if not name.endswith("attention.key.bias"):
            torch.testing.assert_close(first[name], weight, rtol=1e-3, atol=1e-4)


def test_only_the_first_process_writes_the_checkpoint(tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "train.jsonl", single_label_rows())
    recipe = tmp_path / "recipe.toml"
    recipe.write_text("vocab_size = 150\nmax_length = 16\nhidden_size = 16\nnum_heads = 2\n")
    output = tmp_path / "store" / "made" / "1"
    output_text = launch(
        *("budgetformer", "train", "--data", data, "--recipe", recipe, "--out", output),
        *("--device", "cpu", "--threads", 1),
    )
    assert output_text.count(f"wrote {output}") == 1
    assert read_checkpoint(output).manifest.labels == ("animals", "music", "weather")


def test_one_process_trains_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert join_processes(torch.device("cpu")) == (SINGLE_PROCESS, torch.device("cpu"))


def test_several_processes_require_accelerate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(DataError, match=r"accelerate \(extra: gpus\)"):
        join_processes(torch.device("cpu"))
