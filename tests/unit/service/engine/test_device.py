"""The GPU on which an engine computes."""

from __future__ import annotations

import pytest
import torch

from service.engine.__main__ import _device
from service.settings import Settings


@pytest.mark.parametrize(
    ("gpus", "index", "expected"),
    [(1, 0, "cuda"), (1, 3, "cuda"), (2, 1, "cuda:1"), (2, 2, "cuda:0")],
)
def test_engines_are_assigned_to_gpus_in_turn(
    monkeypatch: pytest.MonkeyPatch, gpus: int, index: int, expected: str
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert _device(Settings(device="cuda"), index) == expected
    assert _device(Settings(device="cpu"), index) == "cpu"
