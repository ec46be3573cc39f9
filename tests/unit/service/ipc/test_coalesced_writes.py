"""Writes of one turn of the event loop are sent as one, and none is lost."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest

from service.ipc.coalesced_writes import CoalescedWriter


class Stream:
    """Stands for a stream writer, and records each write."""

    limit = 7

    def __init__(self) -> None:
        self.sent: list[bytes] = []
        self.closed = False

    def write(self, data: bytes) -> None:
        assert not self.closed
        self.sent.append(data)

    def is_closing(self) -> bool:
        return self.closed

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def stream() -> Stream:
    return Stream()


def coalesced(stream: Stream) -> CoalescedWriter:
    return CoalescedWriter(cast(Any, stream))


async def test_writes_of_one_turn_are_one_write(stream: Stream) -> None:
    writer = coalesced(stream)
    for part in (b"head ", b"body ", b"more"):
        writer.write(part)
    assert stream.sent == []
    await asyncio.sleep(0)
    assert stream.sent == [b"head body more"]


async def test_each_turn_has_its_own_write(stream: Stream) -> None:
    writer = coalesced(stream)
    for part in (b"one", b"two", b"three"):
        writer.write(part)
        await asyncio.sleep(0)
    assert stream.sent == [b"one", b"two", b"three"]


async def test_write_now_sends_held_data_first(stream: Stream) -> None:
    writer = coalesced(stream)
    writer.write(b"first ")
    writer.write_now(b"second")
    assert stream.sent == [b"first second"]
    await asyncio.sleep(0)
    assert stream.sent == [b"first second"]


async def test_close_sends_held_data_first(stream: Stream) -> None:
    writer = coalesced(stream)
    writer.write(b"the last word")
    writer.close()
    await asyncio.sleep(0)
    assert stream.sent == [b"the last word"]
    assert stream.closed


async def test_nothing_is_written_to_a_closed_stream(stream: Stream) -> None:
    writer = coalesced(stream)
    writer.write(b"too late")
    stream.close()
    await asyncio.sleep(0)
    writer.write(b"later still")
    await asyncio.sleep(0)
    assert stream.sent == []


async def test_other_attributes_are_those_of_the_stream(stream: Stream) -> None:
    writer = coalesced(stream)
    assert writer.limit == 7
    assert not writer.is_closing()
    stream.close()
    assert writer.is_closing()
