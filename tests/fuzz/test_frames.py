"""Frames between processes: a message, the end, or a `FrameError`."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.engine import protocol
from service.frames import Decoder, FrameError
from tests.support.mutation import fuzzed, mutated_bytes, mutated_json
from tests.unit.service.test_protocol import PAIRS, frame, read_all

CORPUS = sorted((Path(__file__).parent / "corpus" / "frames").iterdir())
READERS = [messages for _, _, messages in PAIRS]

messages = st.one_of(*(strategy for _, strategies, _ in PAIRS for strategy in strategies.values()))


@st.composite
def broken_frames(draw: st.DrawFn) -> bytes:
    """Draw frames whose bytes, or whose fields, are not what they should be."""
    sent = frame(draw(messages))
    if draw(st.booleans()):
        return draw(mutated_bytes(sent))
    body = msgspec.msgpack.encode(_packable(draw(mutated_json(msgspec.msgpack.decode(sent[4:])))))
    return struct.pack("<I", len(body)) + body


def _packable(value: Any) -> Any:
    """Take out what MessagePack cannot hold: integers beyond 64 bits."""
    if isinstance(value, dict):
        return {key: _packable(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_packable(inner) for inner in value]
    return str(value) if isinstance(value, int) and not -(2**63) <= value < 2**64 else value


def read(data: bytes, reader: Decoder) -> None:
    try:
        received = read_all(data, reader)
    except FrameError as error:
        assert str(error)
    else:
        # What was taken for a message is one: it can be sent on.
        for message in received:
            frame(message)


@fuzzed(0.4)
@given(broken_frames(), st.sampled_from(READERS))
def test_broken_frames(data: bytes, reader: Decoder) -> None:
    read(data, reader)


@fuzzed(0.05)
@given(st.binary(max_size=64), st.sampled_from(READERS))
def test_noise(noise: bytes, reader: Decoder) -> None:
    read(struct.pack("<I", len(noise)) + noise, reader)


@fuzzed(0.05)
@given(st.binary(max_size=40))
def test_token_ids(data: bytes) -> None:
    try:
        ids = protocol.unpack_ids(data)
    except FrameError:
        assert len(data) % 4
    else:
        assert protocol.pack_ids(ids) == data


@pytest.mark.parametrize("reader", READERS, ids=["to engine", "to front", "to hub", "from hub"])
@pytest.mark.parametrize("path", CORPUS, ids=lambda path: path.name)
def test_what_was_found_once(path: Path, reader: Decoder) -> None:
    read(path.read_bytes(), reader)
