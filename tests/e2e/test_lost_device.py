"""An engine whose device fails is replaced, and its requests are answered correctly."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from service.engine.device import EXIT_CODE
from tests.e2e.test_serve import send_all
from tests.support import lost_device
from tests.support.processes import server
from tests.support.stores import HEADS, labelled_sentences

pytestmark = pytest.mark.timeout(300)

TEXTS = [text for text, _ in labelled_sentences()]
BODIES: list[dict[str, Any]] = [
    {"input": TEXTS[i % len(TEXTS)], "heads": HEADS} for i in range(192)
]


def test_an_engine_with_a_lost_device_is_replaced_without_wrong_answers(
    model_store: Path, tmp_path: Path
) -> None:
    with server(
        model_store,
        tmp_path,
        engines=2,
        command=[sys.executable, lost_device.__file__, "serve"],
        environment={"LOST_DEVICE": str(tmp_path / "lost")},
        default_model="topics",
        dtype="float32",
        models='["topics"]',
    ) as running:
        before = running.engines()
        responses = asyncio.run(send_all(running.url, BODIES, at_once=64))
        running.wait_ready(2)
        after = running.engines()
        expected = asyncio.run(send_all(running.url, BODIES, at_once=16))
    assert {response.status_code for response in responses} == {200}
    for response, other in zip(responses, expected, strict=True):
        (item,), (expected_item,) = response.json()["data"], other.json()["data"]
        assert item["probs"] == pytest.approx(expected_item["probs"], rel=1e-4)
    assert len(before.items() & after.items()) == 1
    lines = [json.loads(line) for line in running.log.read_text().splitlines()]
    (lost,) = [line for line in lines if line["event"] == "device lost, engine stopped"]
    assert lost["reason"] == f"RuntimeError, then in a probe: {lost_device.ERROR}"
    (down,) = [line for line in lines if line["event"] == "process down"]
    assert down["reason"] == f"it ended with exit code {EXIT_CODE}"
