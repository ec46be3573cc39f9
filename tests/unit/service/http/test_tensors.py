"""Tensors of the Open Inference Protocol, as JSON and as bytes."""

from __future__ import annotations

import json
import struct

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from service.http.tensors import Tensor, read_texts, write_body


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1, max_size=8))
def test_texts_are_read_from_the_binary_form_unchanged(texts: list[str]) -> None:
    blob = Tensor("text", "BYTES", (len(texts), 1), texts).binary()
    assert read_texts("text", [len(texts), 1], None, memoryview(blob)) == texts


def test_one_answer_may_have_json_and_binary_outputs() -> None:
    labels = Tensor("label", "BYTES", (2,), ["a", "ü"])
    macs = Tensor("macs", "INT64", (2,), np.array([1, 2**40]))
    body, length = write_body({"model_name": "m"}, [(labels, False), (macs, True)])
    head = json.loads(body[:length])
    assert head["outputs"][0]["data"] == ["a", "ü"]
    assert head["outputs"][1]["parameters"] == {"binary_data_size": 16}
    assert struct.unpack("<2q", body[length:]) == (1, 2**40)
