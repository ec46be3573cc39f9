"""Mutated frames between processes are read as messages, the end, or a `FrameError`."""

from __future__ import annotations

import asyncio
import functools
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.ipc import engine_messages as protocol
from service.ipc.frames import Decoder, FrameError
from tests.support.mutation import INPUTS, fuzzed, mutated_bytes, mutated_json
from tests.unit.service.ipc.test_messages import PAIRS, frame, reading

CORPUS = sorted((Path(__file__).parent / "corpus" / "frames").iterdir())
READERS = [messages for _, _, messages in PAIRS]


@functools.cache
def sent() -> list[bytes]:
    """Return valid frames of every message, to be mutated."""
    kinds = [strategy for _, strategies, _ in PAIRS for strategy in strategies.values()]
    drawn = []

    @settings(max_examples=max(1, INPUTS // 50), derandomize=True, database=None, deadline=None)
    @given(st.one_of(*kinds))
    def draw(message: Any) -> None:
        drawn.append(frame(message))

    draw()
    return drawn


def broken_frame(random: Random) -> bytes:
    """Return a frame with mutated bytes or mutated fields."""
    valid = random.choice(sent())
    if random.randrange(2):
        return mutated_bytes(random, valid)
    body = msgspec.msgpack.encode(
        _packable(mutated_json(random, msgspec.msgpack.decode(valid[4:])))
    )
    return struct.pack("<I", len(body)) + body


def _packable(value: Any) -> Any:
    """Replace values that MessagePack cannot encode: large integers, lone surrogates."""
    if isinstance(value, dict):
        return {_packable(key): _packable(inner) for key, inner in value.items()}
    if isinstance(value, str):
        return value.encode(errors="replace").decode()
    if isinstance(value, list):
        return [_packable(inner) for inner in value]
    return str(value) if isinstance(value, int) and not -(2**63) <= value < 2**64 else value


Read = Callable[[bytes, Decoder], None]


@pytest.fixture(scope="module")
def read() -> Iterator[Read]:
    """Return a function that reads frames, always in the same event loop."""
    with asyncio.Runner() as runner:

        def read(data: bytes, reader: Decoder) -> None:
            try:
                received = runner.run(reading(data, reader))
            except FrameError as error:
                assert str(error)
            else:
                # Every received message can be sent again.
                for message in received:
                    frame(message)

        yield read


@fuzzed(0.8)
def test_mutated_frames(read: Read, random: Random) -> None:
    read(broken_frame(random), random.choice(READERS))


@fuzzed(0.1)
def test_random_bytes(read: Read, random: Random) -> None:
    noise = random.randbytes(random.randint(0, 64))
    read(struct.pack("<I", len(noise)) + noise, random.choice(READERS))


@fuzzed(0.1)
def test_random_columns(random: Random) -> None:
    ids, lengths, types, *answers = (
        random.randbytes(random.choice([0, 4, 8, 12, random.randint(0, 40)])) for _ in range(11)
    )
    for sent in (protocol.SentTokens(ids, lengths, types), protocol.SentAnswers(*answers)):
        try:
            read = sent.read()
        except FrameError:
            continue
        assert type(sent).of(read).read() is not None  # type: ignore[arg-type]


@pytest.mark.parametrize("reader", READERS, ids=["to engine", "to frontend", "to hub", "from hub"])
@pytest.mark.parametrize("path", CORPUS, ids=lambda path: path.name)
def test_inputs_that_once_failed(read: Read, path: Path, reader: Decoder) -> None:
    read(path.read_bytes(), reader)
