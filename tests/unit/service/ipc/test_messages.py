from __future__ import annotations

import asyncio
import struct
from typing import Any, cast

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from budgetformer.inference.policy import QUALITY_NAMES
from service.ipc import control_messages as hub
from service.ipc import engine_messages as protocol
from service.ipc import frames
from service.ipc.engine_messages import (
    Answer,
    BatchRan,
    Cancel,
    Classify,
    Decisions,
    Done,
    Expired,
    Failed,
    Heartbeat,
    Hello,
    ItemAnswer,
    ItemTokens,
    LevelChanged,
    Load,
    ModelInfo,
    Models,
    Refused,
    Unload,
    Watch,
)
from service.ipc.frames import Decoder, FrameError
from service.telemetry.counts import Difference, Observations

PROPERTY = settings(max_examples=40, deadline=None, derandomize=True, database=None)

numbers = st.integers(0, 2**63 - 1)
finite = st.floats(allow_nan=False, allow_infinity=False)
words = st.text(max_size=20)
by_model = st.dictionaries(words, numbers, max_size=3)
seconds_by_model = st.dictionaries(words, finite, max_size=3)
some_bytes = st.binary(max_size=32)
items = st.builds(
    ItemTokens, ids=some_bytes, segments=some_bytes, whole=some_bytes, whole_segments=some_bytes
)
model_info = st.builds(ModelInfo, words, numbers, finite, numbers, words)
answers = st.builds(
    ItemAnswer,
    logits=st.lists(finite, max_size=4),
    budget=numbers,
    predicted=st.none() | numbers,
    steps=st.lists(numbers, max_size=4),
    heads=st.lists(numbers, max_size=4),
    chosen=st.none() | st.lists(st.lists(numbers, max_size=3), max_size=3),
    macs=numbers,
    dense_macs=numbers,
    error=words,
)
TO_ENGINE = {
    Classify: st.builds(
        Classify,
        id=numbers,
        model=words,
        version=numbers,
        items=st.lists(items, max_size=4),
        quality=words | finite,
        remaining=finite,
        heads=st.none() | numbers,
        max_heads=st.none() | numbers,
        return_heads=st.booleans(),
        request_id=words,
        traceparent=words,
        steps=st.none() | st.lists(numbers, max_size=4),
        decisions=st.none()
        | st.builds(Decisions, st.lists(numbers, max_size=4), st.binary(), st.binary()),
    ),
    Cancel: st.builds(Cancel, numbers),
    Load: st.builds(Load, numbers, words),
    Unload: st.builds(Unload, numbers, words, numbers),
    Watch: st.builds(Watch),
}
levels = st.sampled_from(QUALITY_NAMES)
TO_FRONT = {
    Hello: st.builds(Hello, numbers, numbers, words, words, st.lists(model_info, max_size=2)),
    Models: st.builds(Models, st.lists(model_info, max_size=2)),
    Heartbeat: st.builds(
        Heartbeat, by_model, seconds_by_model, seconds_by_model, by_model, numbers, levels
    ),
    LevelChanged: st.builds(LevelChanged, levels),
    Answer: st.builds(
        Answer, numbers, st.lists(answers, max_size=4), finite, finite, finite, words
    ),
    Refused: st.builds(Refused, numbers, words, numbers),
    Expired: st.builds(Expired, numbers),
    Failed: st.builds(Failed, numbers, words),
    Done: st.builds(Done, numbers),
    BatchRan: st.builds(BatchRan, words, numbers, numbers, numbers, numbers, finite, finite),
}
lines = st.lists(words, max_size=2)
served = st.builds(hub.ServedVersion, words, numbers, words)
series = st.tuples(words, words)
observations = st.builds(
    Observations,
    st.dictionaries(numbers, numbers, max_size=2),
    finite,
    st.dictionaries(
        numbers,
        st.tuples(st.dictionaries(words, words, max_size=1), finite, finite),
        max_size=2,
    ),
)
differences = st.builds(
    Difference,
    st.dictionaries(series, finite, max_size=2),
    st.dictionaries(series, observations, max_size=2),
)
TO_HUB = {
    hub.Here: st.builds(hub.Here, words, numbers, lines, lines),
    hub.Swapped: st.builds(hub.Swapped, numbers),
    hub.Drained: st.builds(hub.Drained, numbers),
    hub.ChangeModel: st.builds(
        hub.ChangeModel, numbers, st.sampled_from(["load", "unload"]), words, st.none() | numbers
    ),
    hub.TellRecent: st.builds(hub.TellRecent, numbers, words),
    hub.Scrape: st.builds(hub.Scrape, numbers, st.booleans()),
    hub.Report: st.builds(hub.Report, numbers, differences),
}
FROM_HUB = {
    hub.Serving: st.builds(
        hub.Serving,
        numbers,
        st.lists(served, max_size=2),
        lines,
        lines,
        st.dictionaries(words, words, max_size=2),
    ),
    hub.Alive: st.builds(hub.Alive),
    hub.Acknowledged: st.builds(hub.Acknowledged, numbers),
    hub.NotShown: st.builds(hub.NotShown, numbers, words),
    hub.Changed: st.builds(hub.Changed, numbers, words),
    hub.ChangeFailed: st.builds(
        hub.ChangeFailed,
        numbers,
        st.sampled_from(
            ["unknown_model", "broken_checkpoint", "engine_down", "load_timeout", "busy"]
        ),
        words,
    ),
    hub.Shown: st.builds(hub.Shown, numbers, st.binary(max_size=20), words),
}
EXAMPLE = Load(7, "/models/topics/1")


class Wire:
    """Stands where a stream writer would, and keeps what is written."""

    def __init__(self) -> None:
        self.sent = b""

    def write(self, data: bytes) -> None:
        self.sent += data


def frame(*messages: Any) -> bytes:
    wire = Wire()
    for message in messages:
        frames.write(cast(asyncio.StreamWriter, wire), message)
    return wire.sent


async def reading(data: bytes, messages: Decoder, chunk: int = 2**16) -> list[object]:
    """Read messages until the stream ends."""
    reader = asyncio.StreamReader()
    for start in range(0, len(data), chunk):
        reader.feed_data(data[start : start + chunk])
    reader.feed_eof()
    read = []
    while (message := await frames.read(reader, messages)) is not None:
        read.append(message)
    return read


def read_all(data: bytes, messages: Decoder, chunk: int = 2**16) -> list[object]:
    """Read messages until the stream ends, in a loop of their own."""
    return asyncio.run(reading(data, messages, chunk))


PAIRS = [
    (protocol.ToEngine, TO_ENGINE, protocol.TO_ENGINE),
    (protocol.ToFront, TO_FRONT, protocol.TO_FRONT),
    (hub.ToHub, TO_HUB, hub.TO_HUB),
    (hub.FromHub, FROM_HUB, hub.FROM_HUB),
]
KINDS = [
    pytest.param(strategy, messages, id=kind.__name__)
    for _, strategies, messages in PAIRS
    for kind, strategy in strategies.items()
]


@pytest.mark.parametrize(("declared", "strategies", "_messages"), PAIRS)
def test_every_message_has_a_round_trip_below(
    declared: Any, strategies: dict[type, Any], _messages: Decoder
) -> None:
    assert set(declared.__args__) == set(strategies)


@pytest.mark.parametrize(("strategy", "messages"), KINDS)
@PROPERTY
@given(data=st.data())
def test_messages_come_out_as_they_went_in(
    strategy: Any, messages: Decoder, data: st.DataObject
) -> None:
    message = data.draw(strategy)
    assert read_all(frame(message), messages) == [message]


@PROPERTY
@given(st.lists(st.one_of(*TO_ENGINE.values()), max_size=6), st.integers(1, 50))
def test_a_stream_keeps_the_order_of_messages_however_it_is_cut(
    messages: list[Any], chunk: int
) -> None:
    assert read_all(frame(*messages), protocol.TO_ENGINE, chunk) == messages


def test_a_frame_is_its_length_and_messagepack_of_an_array_with_the_tag_first() -> None:
    sent = frame(EXAMPLE)
    assert struct.unpack("<I", sent[:4]) == (len(sent) - 4,)
    assert msgspec.msgpack.decode(sent[4:]) == ["Load", 7, "/models/topics/1"]


@pytest.mark.parametrize("kept", range(len(frame(EXAMPLE))))
def test_a_stream_that_breaks_off_reads_as_its_end(kept: int) -> None:
    assert read_all(frame(EXAMPLE)[:kept], protocol.TO_ENGINE) == []


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xc1",
        b"\x00",
        b"hello",
        msgspec.msgpack.encode([]),
        msgspec.msgpack.encode({}),
        msgspec.msgpack.encode(["Load"]),
        msgspec.msgpack.encode(["Load", "seven", "/"]),
        msgspec.msgpack.encode(["Load", 7, None]),
        msgspec.msgpack.encode(["Nonsense", 1]),
        msgspec.msgpack.encode(["Load", 7, "/"]) + b"\x00",
    ],
    ids=repr,
)
@pytest.mark.parametrize("messages", [protocol.TO_ENGINE, protocol.TO_FRONT])
def test_a_frame_that_is_no_message_is_an_error(body: bytes, messages: Decoder) -> None:
    with pytest.raises(FrameError):
        read_all(struct.pack("<I", len(body)) + body, messages)


def test_a_message_of_the_other_direction_is_an_error() -> None:
    with pytest.raises(FrameError):
        read_all(frame(Expired(1)), protocol.TO_ENGINE)
    with pytest.raises(FrameError):
        read_all(frame(Cancel(1)), protocol.TO_FRONT)


@pytest.mark.parametrize("length", [frames.MAX_FRAME_BYTES + 1, 2**32 - 1])
def test_a_length_beyond_reason_is_an_error_before_anything_is_read(length: int) -> None:
    with pytest.raises(FrameError, match=str(length)):
        read_all(struct.pack("<I", length), protocol.TO_ENGINE)


@PROPERTY
@given(st.binary(max_size=64))
def test_noise_is_an_error_or_the_end_and_never_anything_else(noise: bytes) -> None:
    try:
        read_all(struct.pack("<I", len(noise)) + noise, protocol.TO_FRONT)
    except FrameError:
        return


@PROPERTY
@given(st.lists(st.integers(-(2**31), 2**31 - 1)))
def test_token_ids_come_back(ids: list[int]) -> None:
    assert protocol.unpack_ids(protocol.pack_ids(ids)).tolist() == ids


def test_an_item_knows_what_the_encoder_and_step_0_read_of_it() -> None:
    window, whole = protocol.pack_ids([2, 9, 3]), protocol.pack_ids([2, 9, 8, 7, 3])
    short, long = ItemTokens(window), ItemTokens(window, whole=whole)
    assert (short.tokens, short.exit_tokens) == (3, 3)
    assert (long.tokens, long.exit_tokens) == (3, 5)


def test_token_ids_travel_little_endian() -> None:
    assert protocol.pack_ids([1, 258]) == b"\x01\x00\x00\x00\x02\x01\x00\x00"


@pytest.mark.parametrize("length", [1, 2, 3, 5, 7])
def test_token_ids_cut_in_the_middle_are_an_error(length: int) -> None:
    with pytest.raises(FrameError):
        protocol.unpack_ids(bytes(length))
