"""Token ids in place of texts, through the Open Inference Protocol."""

from __future__ import annotations

import json
from typing import Any

import httpx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from budgetformer.tokenization import Text, Tokens
from service.http.kserve import HEADER_LENGTH
from tests.support.serving import Service
from tests.support.stores import (
    CHAINED,
    MAX_TOKENS,
    PAIRS,
    PICKY,
    TAGS,
    TOPICS,
    labelled_sentences,
)

pytestmark = pytest.mark.asyncio(loop_scope="session")

TEXTS = [text for text, _ in labelled_sentences()][:8]
PAIRED = [("The otter slept", "A young fox"), ("The otter slept", "ran past"), ("A", "A choir")]
"""Short enough not to be truncated, because step 0 reads more of a truncated text."""
ROUNDED_OUTPUTS = {"score", "probs"}


def tokens_of(shared: Service, model: str, texts: list[Text]) -> list[Tokens]:
    """Tokenize texts with the model's own tokenizer."""
    found: list[Tokens] = shared.app.state.shared.models.get(model).encoder.encode(texts)
    assert not any(tokens.truncated for tokens in found)
    return found


def vocabulary(shared: Service) -> int:
    size: int = shared.app.state.shared.models.get(TOPICS).checkpoint.architecture.vocab_size
    return size


def padded(rows: list[list[int]], width: int | None = None, padding: int = 0) -> Any:
    found = np.full((len(rows), width or max(map(len, rows))), padding)
    for place, row in enumerate(rows):
        found[place, : len(row)] = row
    return found


def arrays_of(texts: list[Tokens], width: int | None = None) -> dict[str, Any]:
    return {
        "input_ids": padded([text.ids for text in texts], width, padding=1),
        "attention_mask": padded([[1] * len(text) for text in texts], width),
        "token_type_ids": padded([text.type_ids or [0] * len(text) for text in texts], width),
    }


async def infer(
    shared: Service,
    inputs: dict[str, Any],
    model: str = TOPICS,
    kind: str = "INT64",
    form: str = "binary",
    **fields: Any,
) -> httpx.Response:
    """Send integer tensors in one of the forms that the protocol has."""
    described: list[dict[str, Any]] = []
    blob = b""
    for name, values in inputs.items():
        values = np.asarray(values)
        tensor = {"name": name, "shape": list(values.shape), "datatype": kind}
        if form == "binary":
            own = values.astype({"INT32": "<i4", "INT64": "<i8"}[kind]).tobytes()
            tensor["parameters"] = {"binary_data_size": len(own)}
            blob += own
        else:
            tensor["data"] = (values if form == "nested" else values.ravel()).tolist()
        described.append(tensor)
    return await send(shared, described, blob, model, **fields)


async def send(
    shared: Service, inputs: list[Any], blob: bytes = b"", model: str = TOPICS, **fields: Any
) -> httpx.Response:
    head = json.dumps({"inputs": inputs, **fields}).encode()
    return await shared.client.post(
        f"/v2/models/{model}/infer", content=head + blob, headers={HEADER_LENGTH: str(len(head))}
    )


def text_tensors(texts: list[Text]) -> list[dict[str, Any]]:
    pairs = [(text, "") if isinstance(text, str) else text for text in texts]
    columns = {"text": [a for a, _ in pairs], "text_pair": [b for _, b in pairs]}
    return [
        {"name": name, "shape": [len(pairs), 1], "datatype": "BYTES", "data": column}
        for name, column in columns.items()
        if name == "text" or any(column)
    ]


def check_same(answer: httpx.Response, expected: httpx.Response) -> None:
    """Check that two answers are equal up to rounding, as the texts may run in other batches."""
    assert answer.status_code == expected.status_code == 200, answer.text + expected.text
    rows, other_rows = answer.json()["outputs"], expected.json()["outputs"]
    for row, other in zip(rows, other_rows, strict=True):
        assert (row["name"], row["shape"]) == (other["name"], other["shape"])
        if row["name"] in ROUNDED_OUTPUTS:
            assert row["data"] == pytest.approx(other["data"], rel=1e-4)
        else:
            assert row["data"] == other["data"]


@pytest.mark.parametrize("kind", ["INT32", "INT64"])
@pytest.mark.parametrize("form", ["flat", "nested", "binary"])
async def test_token_ids_in_every_format_are_answered_like_the_text(
    shared: Service, kind: str, form: str
) -> None:
    expected = await send(shared, text_tensors(TEXTS))
    given = arrays_of(tokens_of(shared, TOPICS, TEXTS))
    check_same(await infer(shared, given, TOPICS, kind, form), expected)


@pytest.mark.parametrize("model", [TOPICS, TAGS, CHAINED, PICKY])
@pytest.mark.parametrize("level", [{}, {"quality": "best"}, {"quality": "fast"}, {"heads": 2}])
async def test_every_kind_of_model_and_level(
    shared: Service, model: str, level: dict[str, Any]
) -> None:
    if model in (TAGS, PICKY) and "quality" in level:
        level = {"max_heads": 1}
    given = arrays_of(tokens_of(shared, model, TEXTS), MAX_TOKENS)
    expected = await send(shared, text_tensors(TEXTS), model=model, parameters=level)
    check_same(await infer(shared, given, model, parameters=level), expected)


async def test_pairs_of_texts(shared: Service) -> None:
    texts = [*PAIRED, TEXTS[0]]
    given = arrays_of(tokens_of(shared, PAIRS, texts))
    assert given["token_type_ids"].any()
    expected = await send(shared, text_tensors(texts), model=PAIRS)
    check_same(await infer(shared, given, PAIRS), expected)


async def test_attention_mask_and_token_types_are_optional(shared: Service) -> None:
    (tokens,) = tokens_of(shared, TOPICS, TEXTS[:1])
    expected = await send(shared, text_tensors(TEXTS[:1]))
    check_same(await infer(shared, {"input_ids": [tokens.ids]}), expected)


async def test_values_outside_the_mask_are_ignored(shared: Service) -> None:
    given = arrays_of(tokens_of(shared, TOPICS, TEXTS), MAX_TOKENS)
    expected = await infer(shared, given)
    given["input_ids"][given["attention_mask"] == 0] = vocabulary(shared) - 1
    given["token_type_ids"][given["attention_mask"] == 0] = 1
    check_same(await infer(shared, given), expected)


async def test_the_tokenizer_is_not_used(shared: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    given = arrays_of(tokens_of(shared, TOPICS, TEXTS))
    served = shared.app.state.shared.models.get(TOPICS)
    monkeypatch.setattr(served, "encoder", None)
    assert (await infer(shared, given)).status_code == 200


async def test_tokens_are_counted(shared: Service) -> None:
    tokens = tokens_of(shared, TOPICS, TEXTS)
    before = await shared.scrape()
    await infer(shared, arrays_of(tokens, MAX_TOKENS))
    after = await shared.scrape()
    assert after.minus(before, "items_total", model=TOPICS, version=2) == len(TEXTS)
    counted = after.minus(before, "item_tokens_sum", model=TOPICS, version=2)
    assert counted == sum(map(len, tokens))


@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
async def test_any_texts_with_any_padding_are_answered_like_texts(
    shared: Service, data: st.DataObject
) -> None:
    words = st.text(st.sampled_from("the oter slpun. "), min_size=1, max_size=14)
    texts = data.draw(st.lists(words | st.just("") | st.tuples(words, words), min_size=1))
    tokens = tokens_of(shared, PAIRS, texts)
    width = data.draw(st.integers(max(map(len, tokens)), MAX_TOKENS))
    form = data.draw(st.sampled_from(["flat", "nested", "binary"]))
    answer = await infer(shared, arrays_of(tokens, width), PAIRS, form=form)
    check_same(answer, await send(shared, text_tensors(texts), model=PAIRS))


def error_of(response: httpx.Response, status: int = 422) -> str:
    assert response.status_code == status, response.text
    (message,) = response.json().values()
    assert set(response.json()) == {"error"}
    return str(message)


VALID_INPUTS = {"input_ids": [[2, 7, 3], [2, 3, 0]], "attention_mask": [[1, 1, 1], [1, 1, 0]]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_ids": [[2, 7, -1], [2, 3, 0]]}, "input_ids[0][2] must be from 0 to "),
        ({"input_ids": [[2, 7, 3], [2, 3, 2**31 - 1]]}, "input_ids[1][2] must be from 0 to "),
        ({"attention_mask": [[1, 1, 2], [1, 1, 0]]}, "attention_mask[0][2] must be from 0 to 1"),
        ({"attention_mask": [[1, 1, 1], [1, -1, 0]]}, "attention_mask[1][1] must be from 0 to 1"),
        ({"attention_mask": [[1, 1, 1], [0, 1, 1]]}, "attention_mask[1] has a 1 after a 0"),
        ({"attention_mask": [[1, 0, 1], [1, 0, 0]]}, "attention_mask[0] has a 1 after a 0"),
        ({"attention_mask": [[1, 1, 1], [0, 0, 0]]}, "attention_mask[1] has no 1"),
        ({"token_type_ids": [[0, 2, 0], [0, 0, 0]]}, "token_type_ids[0][1] must be from 0 to 1"),
        ({"token_type_ids": [[0, 0], [0, 0]]}, "'token_type_ids' has the shape [2, 2]"),
        ({"attention_mask": [[1, 1, 1]]}, "'attention_mask' has the shape [1, 3]"),
        ({"input_ids": [[1] * (MAX_TOKENS + 1)]}, "token ids are not truncated"),
        ({"input_ids": [2, 7, 3]}, "it must be [items, tokens]"),
        ({"input_ids": [[[2, 7, 3]]]}, "it must be [items, tokens]"),
        ({"input_ids": [[], []]}, "at least one of each"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("form", ["flat", "nested", "binary"])
async def test_invalid_values_are_refused_with_their_position(
    shared: Service, change: dict[str, Any], message: str, form: str
) -> None:
    given = VALID_INPUTS | change
    for kind in ("INT32", "INT64"):
        assert message in error_of(await infer(shared, given, kind=kind, form=form))


async def test_ids_outside_the_vocabulary_are_refused(shared: Service) -> None:
    size = vocabulary(shared)
    assert (await infer(shared, {"input_ids": [[size - 1]]})).status_code == 200
    for wrong in (size, 2**31, 2**32, 2**62, -(2**32)):
        message = error_of(await infer(shared, {"input_ids": [[0, wrong]]}))
        assert f"input_ids[0][1] must be from 0 to {size - 1}" in message


@pytest.mark.parametrize(
    ("data", "shape", "message"),
    [
        ([2, 7, 3], [1, 4], "has 3 elements"),
        ([[2, 7], [3]], [1, 3], "rows of different lengths"),
        ([[2, 7, 3], [2, 7, 3]], [3, 2], "has 6 elements, but its shape is [3, 2]"),
        ([2, [7], 3], [1, 3], "must contain only integers"),
        ([[[2]], [[7]]], [2, 1], "must contain only integers"),
        ([2, "7", 3], [1, 3], "must contain only integers"),
        ([2, True, 3], [1, 3], "must contain only integers"),
        ([2, None, 3], [1, 3], "must contain only integers"),
        ([2, 7.5, 3], [1, 3], "must contain only integers"),
        ([2, 2**64, 3], [1, 3], "must contain only integers"),
        ([2, -(2**70), 3], [1, 3], "must contain only integers"),
        ([], [1, 3], "has 0 elements"),
        ([2], [2**53, 2**53], "has 1 elements"),
        (None, [1, 3], "either `data` or the parameter `binary_data_size`"),
    ],
)
async def test_invalid_json_data_is_refused(
    shared: Service, data: Any, shape: list[int], message: str
) -> None:
    tensor = {"name": "input_ids", "shape": shape, "datatype": "INT32", "data": data}
    assert message in error_of(await send(shared, [tensor]))


@pytest.mark.parametrize(
    ("size", "message"), [(12, None), (8, "has 2 elements"), (11, "end within an element")]
)
async def test_binary_data_of_the_wrong_size_is_refused(
    shared: Service, size: int, message: str | None
) -> None:
    tensor: dict[str, Any] = {"name": "input_ids", "shape": [1, 3], "datatype": "INT32"}
    tensor["parameters"] = {"binary_data_size": size}
    blob = np.array([2, 7, 3], "<i4").tobytes()[:size]
    response = await send(shared, [tensor], blob)
    if message is not None:
        assert message in error_of(response)
        return
    assert response.status_code == 200
    assert "bytes follow the JSON" in error_of(await send(shared, [tensor], blob + b"\0"))


async def test_incompatible_inputs_are_refused(shared: Service) -> None:
    ids = {"name": "input_ids", "shape": [1, 2], "datatype": "INT64", "data": [2, 3]}
    (text,) = text_tensors(TEXTS[:1])
    pair = text | {"name": "text_pair"}
    for inputs, message in (
        ([text, ids], "cannot be combined"),
        ([ids, text], "cannot be combined"),
        ([ids, pair], "cannot be combined"),
        ([text, ids | {"name": "attention_mask"}], "cannot be combined"),
        ([ids | {"name": "attention_mask"}], "input 'input_ids' is missing"),
        ([ids, ids], "input 'input_ids' is given twice"),
        ([ids | {"datatype": "BYTES"}], "it must be INT64 or INT32"),
        ([text | {"datatype": "INT32"}], "it must be BYTES"),
    ):
        assert message in error_of(await send(shared, inputs))


async def test_limits_apply_and_truncate_is_accepted(shared: Service) -> None:
    many = {"input_ids": [[2, 3]] * 65}
    assert "65 items" in error_of(await infer(shared, many), 413)
    assert "no model" in error_of(await infer(shared, VALID_INPUTS, "nothing"), 404)
    response = await infer(shared, VALID_INPUTS, parameters={"truncate": False})
    assert response.status_code == 200
