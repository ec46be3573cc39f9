"""POST /classify answered as an Arrow stream."""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import httpx
import numpy as np
import pyarrow as pa
import pytest

from service.http import arrow_answer
from service.http.accept import ARROW
from tests.support.serving import Service, error_of, poison
from tests.support.stores import (
    CHAINED,
    HEADS,
    LABELS,
    PAIRS,
    PICKY,
    TAGS,
    TOPICS,
    labelled_sentences,
)

pytestmark = pytest.mark.asyncio(loop_scope="session")

TEXTS = [text for text, _ in labelled_sentences()][:12]
LONG = "the otter slept " * 30
TYPES = {
    "index": pa.int32(),
    "label": pa.dictionary(pa.int32(), pa.string()),
    "score": pa.float32(),
    "probs": pa.list_(pa.float32(), len(LABELS)),
    "budget": pa.int32(),
    "predicted": pa.int32(),
    "steps": pa.list_(pa.int32()),
    "heads": pa.int32(),
    "macs": pa.int64(),
    "dense_macs": pa.int64(),
    "tokens": pa.int32(),
    "truncated": pa.bool_(),
    "error": pa.string(),
}


async def post(to: Service, given: Any, path: str = "/classify", **fields: Any) -> httpx.Response:
    body, headers = {"input": given, **fields}, {"Accept": ARROW}
    return await to.client.post(path, json=body, headers=headers)


async def ask(to: Service, given: Any, **fields: Any) -> pa.Table:
    response = await post(to, given, **fields)
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == ARROW
    table = pa.ipc.open_stream(response.content).read_all()
    table.validate(full=True)
    return table


def rows_of(items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the items of a JSON answer as rows of the Arrow table."""
    return [
        {
            "index": item["index"],
            "label": item["label"],
            "score": np.float32(item["score"]),
            "probs": [np.float32(one) for one in item["probs"]],
            "budget": item["heads"]["budget"],
            "predicted": item["heads"]["predicted"],
            "steps": item["heads"]["steps"],
            "heads": item["heads"]["used"],
            "macs": item["macs"],
            "dense_macs": item["dense_macs"],
            "tokens": item["tokens"],
            "truncated": item["truncated"],
            "error": None,
        }
        for item in items
    ]


async def test_columns_and_their_types(shared: Service) -> None:
    table = await ask(shared, TEXTS)
    assert {field.name: field.type for field in table.schema} == TYPES
    assert table.column("label").chunk(0).dictionary.to_pylist() == list(LABELS)


@pytest.mark.parametrize("model", [TOPICS, TAGS, CHAINED, PICKY, PAIRS])
async def test_rows_equal_the_items_of_the_json_answer(shared: Service, model: str) -> None:
    given = [*TEXTS, LONG, {"text": TEXTS[0], "text_pair": TEXTS[1]}]
    answer = await shared.answer(given, model=model)
    table = await ask(shared, given, model=model)
    assert table.to_pylist() == rows_of(answer["data"])
    metadata = {key.decode(): value.decode() for key, value in table.schema.metadata.items()}
    assert metadata.pop("id").startswith("classify-")
    assert metadata == {"model": answer["model"], "quality": answer["data"][0]["quality"]}


async def test_one_text_is_one_row(shared: Service) -> None:
    table = await ask(shared, TEXTS[0], request_id="mine-1", quality=1.5)
    assert table.num_rows == 1
    assert table.schema.metadata[b"id"] == b"classify-mine-1"
    assert table.schema.metadata[b"quality"] == b"1.5"


async def test_without_activation_the_table_has_logits(shared: Service) -> None:
    answer = await shared.answer(TEXTS, use_activation=False)
    assert (await ask(shared, TEXTS, use_activation=False)).to_pylist() == rows_of(answer["data"])


@pytest.mark.parametrize(
    "options", [{"top_k": 2}, {"threshold": 0.3}, {"top_k": 1, "threshold": 0.9}]
)
async def test_top_k_and_threshold_add_a_column_of_labels(
    shared: Service, options: dict[str, Any]
) -> None:
    answer = await shared.answer(TEXTS, model=TAGS, **options)
    table = await ask(shared, TEXTS, model=TAGS, **options)
    assert table.column("labels").to_pylist() == [
        [{"label": one["label"], "score": np.float32(one["score"])} for one in item["labels"]]
        for item in answer["data"]
    ]


async def test_invocations_can_answer_with_arrow_too(shared: Service) -> None:
    response = await post(shared, TEXTS, "/invocations")
    assert pa.ipc.open_stream(response.content).read_all() == await ask(shared, TEXTS)
    response = await shared.client.post(
        "/invocations", json={"inputs": TEXTS[0]}, headers={"Accept": ARROW}
    )
    assert response.json()[0]["label"] == LABELS[0]


@pytest.mark.parametrize("accept", ["*/*", "application/json", f"{ARROW};q=0.5, */*", ""])
async def test_json_unless_arrow_is_preferred(shared: Service, accept: str) -> None:
    response = await shared.client.post(
        "/classify", json={"input": TEXTS[0]}, headers={"Accept": accept}
    )
    assert response.headers["content-type"] == "application/json"
    assert response.json()["data"][0]["label"] == LABELS[0]


async def test_errors_are_json(shared: Service) -> None:
    error_of(await post(shared, []), 422, "invalid_field", "input")
    error_of(await post(shared, "a", model="none"), 404, "unknown_model")


@pytest.mark.parametrize(
    ("field", "value"), [("raw_scores", False), ("raw_scores", True), ("return_heads", True)]
)
async def test_options_without_a_column_are_refused(
    shared: Service, field: str, value: bool
) -> None:
    error = error_of(await post(shared, "a", **{field: value}), 422, "invalid_field", field)
    assert "Arrow" in error["message"]


@pytest.mark.parametrize("path", ["/classify", "/invocations"])
async def test_without_pyarrow_the_error_names_the_extra_to_install(
    shared: Service, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    arrow_answer.pyarrow.cache_clear()
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "pyarrow", None)
        error = error_of(await post(shared, "a", path), 406, "not_acceptable", "Accept")
    assert "pip install 'budgetformer-serving[arrow]'" in error["message"]
    assert (await ask(shared, "a")).num_rows == 1


async def test_the_first_requests_may_be_concurrent(shared: Service) -> None:
    arrow_answer.pyarrow.cache_clear()
    tables = await asyncio.gather(*(ask(shared, text) for text in TEXTS))
    assert [table.num_rows for table in tables] == [1] * len(TEXTS)


class TestFailures:
    pytestmark = pytest.mark.asyncio(loop_scope="function")

    async def test_a_failed_text_is_a_row_of_nulls(self, fresh: Service) -> None:
        items = (await fresh.answer(TEXTS, heads=HEADS))["data"]
        (model,) = fresh.core.models.values()
        with poison(model.network, items[0]["tokens"], "raise"):
            answer = await fresh.answer(TEXTS, heads=HEADS)
            before = await fresh.scrape()
            table = await ask(fresh, TEXTS, heads=HEADS, top_k=1)
        after = await fresh.scrape()
        assert after.minus(before, "requests_total", route="/classify", outcome="partial") == 1
        failed = [item["index"] for item in answer["data"] if "error" in item]
        assert 0 < len(failed) < len(TEXTS)
        for row, item in zip(table.to_pylist(), answer["data"], strict=True):
            assert row.pop("index") == item["index"]
            if "error" in item:
                assert row.pop("error") == item["error"]["message"]
                assert set(row.values()) == {None}
            else:
                assert (row["error"], row["label"]) == (None, item["label"])

    async def test_the_request_fails_if_all_texts_fail(self, fresh: Service) -> None:
        (item,) = (await fresh.answer(TEXTS[:1], heads=HEADS))["data"]
        (model,) = fresh.core.models.values()
        with poison(model.network, item["tokens"], "raise"):
            error_of(await post(fresh, TEXTS[:1], heads=HEADS), 500, "item_failed")
