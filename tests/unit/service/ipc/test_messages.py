"""Messages between processes: encoding, frames, and invalid data."""

from __future__ import annotations

import asyncio
import struct
from typing import Any, cast

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from budgetformer.inference.policy import QUALITY_NAMES
from budgetformer.inference.texts import Texts, TokenColumns
from service.ipc import control_messages as hub
from service.ipc import engine_messages as protocol
from service.ipc import frames
from service.ipc.engine_messages import (
    Answer,
    BatchReport,
    Cancel,
    Classify,
    Configure,
    Decisions,
    Done,
    Expired,
    Failed,
    Heartbeat,
    Hello,
    LevelChanged,
    Load,
    ModelInfo,
    Models,
    Refused,
    SentAnswers,
    SentTexts,
    SentTokens,
    SubscribeBatches,
    Unload,
)
from service.ipc.frames import Decoder, FrameError
from service.telemetry.counts import Difference, Observations
from tests.support.columns import answers_to, rows

PROPERTY = settings(max_examples=40, deadline=None, derandomize=True, database=None)

numbers = st.integers(0, 2**63 - 1)
finite = st.floats(allow_nan=False, allow_infinity=False)
words = st.text(max_size=20)
by_model = st.dictionaries(words, numbers, max_size=3)
seconds_by_model = st.dictionaries(words, finite, max_size=3)
short_bytes = st.binary(max_size=32)
sent_tokens = st.builds(SentTokens, short_bytes, short_bytes, short_bytes)
sent_texts = st.builds(SentTexts, sent_tokens, st.none() | sent_tokens)
model_info = st.builds(ModelInfo, words, numbers, finite, numbers, words)
sent_answers = st.builds(
    SentAnswers,
    *[short_bytes] * 8,
    chosen=st.none() | st.lists(st.lists(st.lists(numbers, max_size=3), max_size=3), max_size=3),
    errors=st.dictionaries(numbers, words, max_size=2),
)
TO_ENGINE = {
    Classify: st.builds(
        Classify,
        id=numbers,
        model=words,
        version=numbers,
        texts=sent_texts,
        quality=words | finite,
        remaining=finite,
        heads=st.none() | numbers,
        max_heads=st.none() | numbers,
        return_heads=st.booleans(),
        request_id=words,
        traceparent=words,
        steps=short_bytes,
        decisions=st.none() | st.builds(Decisions, short_bytes, short_bytes, short_bytes),
    ),
    Cancel: st.builds(Cancel, numbers),
    Load: st.builds(Load, numbers, words),
    Configure: st.builds(
        Configure,
        numbers,
        words,
        st.sampled_from(QUALITY_NAMES),
        st.dictionaries(words, st.sampled_from(QUALITY_NAMES), max_size=2),
        st.dictionaries(words, numbers, max_size=2),
        st.dictionaries(words, st.lists(numbers, max_size=2), max_size=2),
    ),
    Unload: st.builds(Unload, numbers, words, numbers),
    SubscribeBatches: st.builds(SubscribeBatches),
}
levels = st.sampled_from(QUALITY_NAMES)
TO_FRONTEND = {
    Hello: st.builds(Hello, numbers, numbers, words, words, st.lists(model_info, max_size=2)),
    Models: st.builds(Models, st.lists(model_info, max_size=2)),
    Heartbeat: st.builds(
        Heartbeat, by_model, seconds_by_model, seconds_by_model, by_model, numbers, levels
    ),
    LevelChanged: st.builds(LevelChanged, levels),
    Answer: st.builds(Answer, numbers, sent_answers, finite, finite, finite, words),
    Refused: st.builds(Refused, numbers, words, numbers),
    Expired: st.builds(Expired, numbers),
    Failed: st.builds(Failed, numbers, words),
    Done: st.builds(Done, numbers),
    BatchReport: st.builds(BatchReport, words, numbers, numbers, numbers, numbers, finite, finite),
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
    hub.FrontendHello: st.builds(hub.FrontendHello, words, numbers, lines, lines),
    hub.CatalogApplied: st.builds(hub.CatalogApplied, numbers),
    hub.Drained: st.builds(hub.Drained, numbers),
    hub.ChangeModel: st.builds(
        hub.ChangeModel, numbers, st.sampled_from(["load", "unload"]), words, st.none() | numbers
    ),
    hub.ChangeRollOut: st.builds(
        hub.ChangeRollOut,
        numbers,
        st.sampled_from(["begin", "promote", "rollback", "show"]),
        words,
        st.none() | numbers,
        st.dictionaries(words, st.none() | st.floats(0, 1)),
    ),
    hub.GetRecentTraffic: st.builds(hub.GetRecentTraffic, numbers, words),
    hub.Scrape: st.builds(hub.Scrape, numbers, st.booleans()),
    hub.CountsReport: st.builds(hub.CountsReport, numbers, differences),
    hub.ProblemReport: st.builds(hub.ProblemReport, words, st.none() | words),
    hub.SettingsApplied: st.builds(hub.SettingsApplied, numbers),
    hub.ReloadSettings: st.builds(hub.ReloadSettings, numbers),
}
FROM_HUB = {
    hub.CatalogUpdate: st.builds(
        hub.CatalogUpdate,
        numbers,
        st.lists(served, max_size=2),
        lines,
        lines,
        st.dictionaries(words, words, max_size=2),
    ),
    hub.HubHeartbeat: st.builds(
        hub.HubHeartbeat, numbers, st.dictionaries(words, words, max_size=2), st.booleans()
    ),
    hub.ReportAcknowledged: st.builds(hub.ReportAcknowledged, numbers),
    hub.RequestFailed: st.builds(hub.RequestFailed, numbers, words),
    hub.ModelChanged: st.builds(hub.ModelChanged, numbers, words),
    hub.ChangeFailed: st.builds(
        hub.ChangeFailed,
        numbers,
        st.sampled_from(
            ["unknown_model", "broken_checkpoint", "engine_down", "load_timeout", "busy"]
        ),
        words,
    ),
    hub.ContentReply: st.builds(hub.ContentReply, numbers, st.binary(max_size=20), words),
    hub.SettingsUpdate: st.builds(hub.SettingsUpdate, numbers, st.binary(max_size=20)),
    hub.SettingsReloaded: st.builds(hub.SettingsReloaded, numbers, lines, lines, lines),
    hub.SettingsRejected: st.builds(
        hub.SettingsRejected, numbers, st.sampled_from(["invalid_settings", "not_supported"]), words
    ),
}
EXAMPLE = Load(7, "/models/topics/1")


class Wire:
    """Stands for a stream writer, and keeps the data."""

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
    """Read messages until the stream ends, in a new event loop."""
    return asyncio.run(reading(data, messages, chunk))


PAIRS = [
    (protocol.ToEngine, TO_ENGINE, protocol.TO_ENGINE),
    (protocol.ToFrontend, TO_FRONTEND, protocol.TO_FRONTEND),
    (hub.ToHub, TO_HUB, hub.TO_HUB),
    (hub.FromHub, FROM_HUB, hub.FROM_HUB),
]
KINDS = [
    pytest.param(strategy, messages, id=kind.__name__)
    for _, strategies, messages in PAIRS
    for kind, strategy in strategies.items()
]


@pytest.mark.parametrize(("declared", "strategies", "_messages"), PAIRS)
def test_every_message_has_a_strategy(
    declared: Any, strategies: dict[type, Any], _messages: Decoder
) -> None:
    assert set(declared.__args__) == set(strategies)


@pytest.mark.parametrize(("strategy", "messages"), KINDS)
@PROPERTY
@given(data=st.data())
def test_messages_are_read_as_they_were_written(
    strategy: Any, messages: Decoder, data: st.DataObject
) -> None:
    message = data.draw(strategy)
    assert read_all(frame(message), messages) == [message]


@PROPERTY
@given(st.lists(st.one_of(*TO_ENGINE.values()), max_size=6), st.integers(1, 50))
def test_messages_keep_their_order_for_any_size_of_chunks(messages: list[Any], chunk: int) -> None:
    assert read_all(frame(*messages), protocol.TO_ENGINE, chunk) == messages


def test_a_frame_is_a_length_and_a_messagepack_array() -> None:
    sent = frame(EXAMPLE)
    assert struct.unpack("<I", sent[:4]) == (len(sent) - 4,)
    assert msgspec.msgpack.decode(sent[4:]) == ["Load", 7, "/models/topics/1"]


@pytest.mark.parametrize("kept", range(len(frame(EXAMPLE))))
def test_an_incomplete_frame_is_the_end_of_the_stream(kept: int) -> None:
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
@pytest.mark.parametrize("messages", [protocol.TO_ENGINE, protocol.TO_FRONTEND])
def test_an_invalid_frame_is_an_error(body: bytes, messages: Decoder) -> None:
    with pytest.raises(FrameError):
        read_all(struct.pack("<I", len(body)) + body, messages)


def test_a_message_of_the_other_direction_is_an_error() -> None:
    with pytest.raises(FrameError):
        read_all(frame(Expired(1)), protocol.TO_ENGINE)
    with pytest.raises(FrameError):
        read_all(frame(Cancel(1)), protocol.TO_FRONTEND)


@pytest.mark.parametrize("length", [frames.MAX_FRAME_BYTES + 1, 2**32 - 1])
def test_a_frame_above_the_size_limit_is_an_error(length: int) -> None:
    with pytest.raises(FrameError, match=str(length)):
        read_all(struct.pack("<I", length), protocol.TO_ENGINE)


@PROPERTY
@given(st.binary(max_size=64))
def test_random_bytes_are_a_frame_error_or_the_end(noise: bytes) -> None:
    try:
        read_all(struct.pack("<I", len(noise)) + noise, protocol.TO_FRONTEND)
    except FrameError:
        return


ids = st.lists(st.integers(-(2**31), 2**31 - 1), max_size=4)
types = st.lists(st.integers(0, 1), min_size=4, max_size=4)


@PROPERTY
@given(st.lists(st.tuples(ids, ids, types), max_size=4), st.booleans(), st.booleans())
def test_texts_are_read_as_they_were_written(
    drawn: list[tuple[list[int], list[int], list[int]]], same: bool, step0_reads: bool
) -> None:
    windows = TokenColumns.of(
        [window for window, _, _ in drawn], [types[: len(window)] for window, _, types in drawn]
    )
    full_texts = windows if same else TokenColumns.of([full for _, full, _ in drawn])
    read = SentTexts.of(Texts(windows, full_texts), step0_reads).read()
    assert columns(read.window) == columns(windows)
    assert columns(read.full_text) == columns(full_texts if step0_reads else windows)
    assert (read.full_text is read.window) == (same or not step0_reads)


def columns(texts: TokenColumns) -> tuple[list[int], list[int], list[int] | None]:
    return (
        texts.ids.tolist(),
        texts.lengths.tolist(),
        None if texts.types is None else texts.types.tolist(),
    )


def test_token_ids_are_sent_little_endian() -> None:
    assert SentTokens.of(TokenColumns.of([[1, 258]])).ids == b"\x01\x00\x00\x00\x02\x01\x00\x00"


VALID = SentTokens.of(TokenColumns.of([[1, 2], [3]], [[0, 1], [0]]))


@pytest.mark.parametrize(
    "invalid",
    [
        {"ids": VALID.ids[:-1]},
        {"ids": VALID.ids[:-4]},
        {"ids": b""},
        {"lengths": VALID.lengths[:4]},
        {"lengths": VALID.lengths[:3]},
        {"lengths": np.array([-1, 4], "<i4").tobytes()},
        {"lengths": np.array([2**31 - 1, 2**31 - 1, 5], "<i4").tobytes()},
        {"types": VALID.types[:-4]},
        {"types": b"\0"},
    ],
    ids=str,
)
def test_inconsistent_columns_of_tokens_are_an_error(invalid: dict[str, bytes]) -> None:
    with pytest.raises(FrameError):
        msgspec.structs.replace(VALID, **invalid).read()


def test_a_missing_full_text_is_an_error() -> None:
    with pytest.raises(FrameError, match="one full text per"):
        SentTexts(VALID, SentTokens.of(TokenColumns.of([[1]]))).read()


@PROPERTY
@given(st.integers(0, 3), st.booleans(), st.booleans())
def test_answers_are_read_as_they_were_written(count: int, chosen: bool, unfinished: bool) -> None:
    heads = [[[0, 2], []]] * count if chosen else None
    errors = {0: "it failed"} if count else {}
    answers = answers_to(count, next_step=[2 * unfinished] * count, chosen=heads, errors=errors)
    assert rows(SentAnswers.of(answers).read()) == rows(answers)


SENT = SentAnswers.of(answers_to(2))


@pytest.mark.parametrize("name", [name for name in SENT.__struct_fields__ if name != "errors"])
def test_inconsistent_columns_of_answers_are_an_error(name: str) -> None:
    invalid = [[[]]] if name == "chosen" else b"\0" * 11
    with pytest.raises(FrameError):
        msgspec.structs.replace(SENT, **{name: invalid}).read()
