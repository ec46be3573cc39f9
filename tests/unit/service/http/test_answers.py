"""One request's answers, written as JSON, as an Arrow stream and as tensors of KServe."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from fastapi import Request
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from service.http.answers import Answered
from service.http.arrow_answer import arrow_response
from service.http.classify_answer import classify_response
from service.http.kserve import HEADER_LENGTH, OUTPUTS, infer_response
from service.http.schemas import ClassifyRequest, InferOutput
from service.ipc.answers import Answers
from service.pipeline.served_models import ServedModel, open_model
from tests.support.stores import LABELS, TAGS, TOPICS, model_store

__all__ = ["model_store"]

STEPS, TYPES = 4, {"FP32": "<f4", "INT32": "<i4", "INT64": "<i8", "BOOL": "?"}


@cache
def opened(path: Path) -> ServedModel:
    return open_model(path)


def integers(kind: Any, low: int, high: int, count: int) -> st.SearchStrategy[Any]:
    return arrays.arrays(kind, count, elements=st.integers(low, high))


@st.composite
def answers(draw: st.DrawFn) -> Answers:
    """Draw answers of any number of texts, some of which failed."""
    count = draw(st.integers(1, 5))
    logits = st.floats(-30, 30, width=32)
    ran = arrays.arrays(bool, (count, STEPS + 1))
    places = st.sets(st.integers(0, count - 1), max_size=count - 1)
    return Answers(
        logits=draw(arrays.arrays(np.float32, (count, len(LABELS)), elements=logits)),
        step=draw(integers(np.int32, 0, STEPS, count)),
        predicted=draw(integers(np.int32, -1, STEPS, count)),
        ran=draw(ran),
        heads=draw(integers(np.int32, 0, 2**31 - 1, count)),
        macs=draw(integers(np.int64, 0, 2**53, count)),
        dense_macs=draw(integers(np.int64, 0, 2**53, count)),
        next_step=np.zeros(count, np.int32),
        errors=dict.fromkeys(draw(places), "the pass failed"),
    )


def tensors(answered: Answered) -> dict[str, list[Any]]:
    """Return what KServe's binary form says, by output, a list for each text."""
    wanted = [(output, InferOutput(name=name)) for name, output in OUTPUTS.items()]
    shape = [len(answered.answers), 1]
    response = infer_response(answered, {}, wanted, shape, binary=True)
    length = int(response.headers[HEADER_LENGTH])
    blob, found = memoryview(response.body)[length:], {}
    for output in json.loads(response.body[:length])["outputs"]:
        size = output["parameters"]["binary_data_size"]
        own, blob = bytes(blob[:size]), blob[size:]
        if output["datatype"] == "BYTES":
            values = []
            while own:
                end = 4 + int.from_bytes(own[:4], "little")
                values.append([own[4:end].decode()])
                own = own[end:]
        else:
            dtype = TYPES[output["datatype"]]
            values = np.frombuffer(own, dtype).reshape(output["shape"]).tolist()
        found[output["name"]] = values
    assert not blob
    return found


@pytest.mark.parametrize("name", [f"{TOPICS}/2", f"{TAGS}/1"])
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(drawn=answers(), top_k=st.none() | st.integers(1, 4), raw=st.booleans(), data=st.data())
def test_every_form_says_the_same(
    model_store: Path, name: str, drawn: Answers, top_k: int | None, raw: bool, data: st.DataObject
) -> None:
    count = len(drawn)
    threshold = data.draw(st.none() | st.floats(0, 1))
    body = ClassifyRequest(input="a", top_k=top_k, threshold=threshold, use_activation=not raw)
    lengths = data.draw(integers(np.int32, 1, 2**20, count))
    truncated = data.draw(arrays.arrays(bool, count))
    answered = Answered("7", opened(model_store / name), body, 1.5, lengths, truncated, drawn)
    request = Request({"type": "http"})
    written = json.loads(classify_response(request, answered).body)
    table = pa.ipc.open_stream(arrow_response(request, answered).body).read_all()
    table.validate(full=True)
    metadata = {b"model": written["model"], b"quality": "1.5", b"id": written["id"]}
    assert table.schema.metadata == {key: value.encode() for key, value in metadata.items()}
    assert ("labels" in table.schema.names) == (top_k is not None or threshold is not None)
    rows = table.to_pylist()
    used = sum(item["heads"]["used"] for item in written["data"] if "error" not in item)
    assert written["usage"]["heads_used"] == used
    for item, row in zip(written["data"], rows, strict=True):
        assert row.pop("index") == item["index"]
        error = row.pop("error")
        if "error" in item:
            assert error == item["error"]["message"]
            assert set(row.values()) == {None}
            continue
        heads = item["heads"]
        labels = row.pop("labels", None)
        assert labels is None or labels == [
            {"label": one["label"], "score": np.float32(one["score"])} for one in item["labels"]
        ]
        assert row == {
            "label": item["label"], "score": np.float32(item["score"]),
            "probs": [np.float32(one) for one in item["probs"]],
            "budget": heads["budget"], "predicted": heads["predicted"], "steps": heads["steps"],
            "heads": heads["used"], "macs": item["macs"], "dense_macs": item["dense_macs"],
            "tokens": item["tokens"], "truncated": item["truncated"],
        }  # fmt: skip
    if not drawn.errors and not raw:
        outputs = tensors(answered)
        for place in range(count):
            row, found = rows[place], {key: value[place] for key, value in outputs.items()}
            assert found["steps"] == [step in row["steps"] for step in range(STEPS + 1)]
            assert found["probs"] == row["probs"]
            assert found["predicted"] == [-1 if row["predicted"] is None else row["predicted"]]
            for key in ("label", "score", "heads", "budget", "macs"):
                assert found[key] == [row[key]]


def test_pyarrow_is_not_imported_before_it_is_asked_for() -> None:
    code = "import sys, service.http.app; sys.exit('pyarrow' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
