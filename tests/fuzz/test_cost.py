"""Hostile bodies need memory and tokenization only in proportion to their size.

Traced memory and counted characters do not depend on the load of the machine.
"""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from random import Random
from typing import Any

import pytest

from budgetformer.tokenization import STEP_CHARACTERS, Text, TextEncoder
from service.http.bodies import parse
from service.http.errors import ApiError
from service.http.schemas import ClassifyRequest, PredictRequest, RequestBody, TextPair
from tests.support.mutation import fuzzed, mutated_bytes
from tests.support.mutation import text as some_text
from tests.support.texts import small_tokenizer

SIZE = 200_000
VALUES = 2000
MEMORY_PER_BYTE, MEMORY = 20, 2**20
MAX_TOKENS = 64
UNITS = [
    "[]", "{}", '""', "0", "1e999", "-0.0", "null", "true", '{"text":""}',
    '{"text":"a","text_pair":"b"}', '["a","b"]', "[[[[]]]]", '"\\u0061"', '"\\ud83d"',
    '"\U0001f600"', '"a', "[", '{"a":', "9" * 400,
    '"a":1', '"model":null', "NaN", " ", "\\", '"\\', "\ufeff", ",",
]  # fmt: skip
WORDS = [
    "a ", "context ", "  ", "\n", "a", ".", "\u6f22", "\u0301", "e\u0301", "\U0001f600", "\x01",
    "\ud55c", "[MASK]", "x" * 101 + " ", "\u3000", "##a ", "\ufdfa",
]  # fmt: skip
SCHEMAS: dict[str, type[RequestBody]] = {"input": ClassifyRequest, "inputs": PredictRequest}


class Counting:
    """A tokenizer that counts the characters of its calls."""

    def __init__(self) -> None:
        self.calls: list[int] = []
        self._tokenizer = small_tokenizer()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def encode_batch_fast(self, texts: list[str], **options: Any) -> Any:
        self.calls.append(sum(map(len, texts)))
        return self._tokenizer.encode_batch_fast(texts, **options)


@cache
def counting_encoder() -> tuple[TextEncoder, Counting]:
    encoder = TextEncoder(small_tokenizer(), MAX_TOKENS)
    counting = Counting()
    encoder.tokenizer = counting  # type: ignore[assignment]
    return encoder, counting


@contextmanager
def bounded_memory(size: int) -> Iterator[None]:
    """Check that the memory of a block is bounded by the size of its input in bytes."""
    tracemalloc.start()
    try:
        yield
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak <= MEMORY + MEMORY_PER_BYTE * size, f"{peak} bytes for {size}"


def hostile_json(random: Random, field: str) -> bytes:
    """Return a body with many repetitions of a small value, valid or nearly valid."""
    units = random.choices([*UNITS, json.dumps(some_text(random, 20))], k=random.randint(1, 3))
    joint = random.choice([",", ",", ",", "", ":"])
    unit = joint.join(units) + joint
    inner = unit * (random.randint(1, SIZE) // len(unit) + 1)
    opening, closing = random.choice([("[", "]"), ("[", "]"), ("{", "}"), ('"', '"'), ("", "")])
    body = f'{{"{field}":{opening}{inner.rstrip(",")}{closing}}}'
    name = random.choice(["k", "imput", '\\"', "\u00e9"]) * random.randint(1, SIZE // 4)
    return random.choice([body, body, body, f'{{"{field}":"a","{name}":{unit}1}}', inner]).encode()


def hostile_text(random: Random) -> str:
    parts = random.choices(WORDS, k=random.randint(1, 3))
    repeats = [random.choice([1, 3, 100, 10_000]) // len(part) + 1 for part in parts]
    mixed = "".join(part * times for part, times in zip(parts, repeats, strict=True))
    return mixed * random.choice([1, 1, 5])


@pytest.mark.parametrize("field", SCHEMAS)
@fuzzed(0.3)
def test_parsing_needs_memory_in_proportion_to_the_body(field: str, random: Random) -> None:
    body = hostile_json(random, field)
    if random.randrange(4) == 0:
        body = mutated_bytes(random, body)
    with bounded_memory(len(body)):
        try:
            parse(body, SCHEMAS[field], VALUES)
        except ApiError as error:
            answer = json.dumps(error.body())
            assert error.status in (400, 413, 422)
            assert len(answer) < 3000


@fuzzed(0.4)
def test_tokenization_reads_characters_in_proportion_to_the_texts(random: Random) -> None:
    encoder, counting = counting_encoder()
    texts: list[Text] = [
        hostile_text(random)
        if random.randrange(2)
        else (hostile_text(random), hostile_text(random))
        for _ in range(random.randint(1, 4))
    ]
    flat = [text if isinstance(text, str) else "".join(text) for text in texts]
    counting.calls.clear()
    with bounded_memory(sum(map(len, flat)) + 4 * STEP_CHARACTERS):
        encoded = encoder.encode(texts)
    assert sum(counting.calls) <= 2 * sum(map(len, flat))  # short texts may be tokenized twice
    assert max(counting.calls) <= max(STEP_CHARACTERS + 1000, *map(len, flat))
    assert all(len(tokens) <= MAX_TOKENS for tokens in encoded)


def test_validating_invalid_items_needs_little_memory() -> None:
    """The body has the maximum number of values, all of them invalid."""
    for unit in ("[]", "{}", "1", '{"text":[],"a":1}'):
        body = f'{{"input":[{",".join([unit] * (VALUES // 4))}]}}'.encode()
        with bounded_memory(16 * VALUES), pytest.raises(ApiError):
            parse(body, ClassifyRequest, VALUES)


def test_a_pair_counts_as_one_item() -> None:
    body = json.dumps({"input": [{"text": "a", "text_pair": "b"}] * (VALUES // 4)}).encode()
    found = parse(body, ClassifyRequest, VALUES)
    assert found.input == [TextPair(text="a", text_pair="b")] * (VALUES // 4)
