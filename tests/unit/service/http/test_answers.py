"""JSON, Arrow and KServe's binary tensors contain the same answers."""

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
    """Draw the answers of 1 to 5 texts, some of which failed."""
    count = draw(st.integers(1, 5))
    logits = st.floats(-30, 30, width=32)
    ran = arrays.arrays(bool, (count, STEPS + 1))
    failed = st.sets(st.integers(0, count - 1), max_size=count - 1)
    return Answers(
        logits=draw(arrays.arrays(np.float32, (count, len(LABELS)), elements=logits)),
        step=draw(integers(np.int32, 0, STEPS, count)),
        predicted=draw(integers(np.int32, -1, STEPS, count)),
        ran=draw(ran),
        heads=draw(integers(np.int32, 0, 2**31 - 1, count)),
        macs=draw(integers(np.int64, 0, 2**53, count)),
        dense_macs=draw(integers(np.int64, 0, 2**53, count)),
        next_step=np.zeros(count, np.int32),
        errors=dict.fromkeys(draw(failed), "the pass failed"),
    )


def tensors(answered: Answered) -> dict[str, list[Any]]:
    """Return the values of KServe's binary form by output, with a list for each text."""
    wanted = [(output, InferOutput(name=name)) for name, output in OUTPUTS.items()]
    shape = [len(answered.answers), 1]
    response = infer_response(answered, {}, wanted, shape, binary=True)
    length = int(response.headers[HEADER_LENGTH])
    blob, by_name = memoryview(response.body)[length:], {}
    for output in json.loads(response.body[:length])["outputs"]:
        size = output["parameters"]["binary_data_size"]
        data, blob = bytes(blob[:size]), blob[size:]
        if output["datatype"] == "BYTES":
            values = []
            while data:
                end = 4 + int.from_bytes(data[:4], "little")
                values.append([data[4:end].decode()])
                data = data[end:]
        else:
            dtype = TYPES[output["datatype"]]
            values = np.frombuffer(data, dtype).reshape(output["shape"]).tolist()
        by_name[output["name"]] = values
    assert not blob
    return by_name


@pytest.mark.parametrize("name", [f"{TOPICS}/2", f"{TAGS}/1"])
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(drawn=answers(), top_k=st.none() | st.integers(1, 4), raw=st.booleans(), data=st.data())
def test_every_format_has_the_same_answers(
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
            {"label": label["label"], "score": np.float32(label["score"])}
            for label in item["labels"]
        ]
        assert row == {
            "label": item["label"], "score": np.float32(item["score"]),
            "probs": [np.float32(prob) for prob in item["probs"]],
            "budget": heads["budget"], "predicted": heads["predicted"], "steps": heads["steps"],
            "heads": heads["used"], "macs": item["macs"], "dense_macs": item["dense_macs"],
            "tokens": item["tokens"], "truncated": item["truncated"],
        }  # fmt: skip
    if not drawn.errors and not raw:
        outputs = tensors(answered)
        for i, row in enumerate(rows):
            tensor_row = {key: value[i] for key, value in outputs.items()}
            predicted = -1 if row["predicted"] is None else row["predicted"]
            assert tensor_row["steps"] == [step in row["steps"] for step in range(STEPS + 1)]
            assert tensor_row["probs"] == row["probs"]
            assert tensor_row["predicted"] == [predicted]
            for key in ("label", "score", "heads", "budget", "macs"):
                assert tensor_row[key] == [row[key]]


def test_pyarrow_is_not_imported_with_the_application() -> None:
    code = "import sys, service.http.app; sys.exit('pyarrow' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
