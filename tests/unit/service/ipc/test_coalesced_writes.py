"""What is written in one turn of the event loop leaves together, and nothing is lost."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest

from service.ipc.coalesced_writes import CoalescedWriter


class Stream:
    """Stands where a transport would, and keeps what is written, call by call."""

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


def together(stream: Stream) -> CoalescedWriter:
    return CoalescedWriter(cast(Any, stream))


async def test_one_turn_is_one_write(stream: Stream) -> None:
    writer = together(stream)
    for part in (b"head ", b"body ", b"more"):
        writer.write(part)
    assert stream.sent == []
    await asyncio.sleep(0)
    assert stream.sent == [b"head body more"]


async def test_every_turn_has_its_own(stream: Stream) -> None:
    writer = together(stream)
    for part in (b"one", b"two", b"three"):
        writer.write(part)
        await asyncio.sleep(0)
    assert stream.sent == [b"one", b"two", b"three"]


async def test_what_cannot_wait_leaves_at_once_behind_what_is_held(stream: Stream) -> None:
    writer = together(stream)
    writer.write(b"first ")
    writer.write_now(b"second")
    assert stream.sent == [b"first second"]
    await asyncio.sleep(0)
    assert stream.sent == [b"first second"]


async def test_what_is_held_leaves_before_the_stream_closes(stream: Stream) -> None:
    writer = together(stream)
    writer.write(b"the last word")
    writer.close()
    await asyncio.sleep(0)
    assert stream.sent == [b"the last word"]
    assert stream.closed


async def test_nothing_is_written_once_the_other_side_is_gone(stream: Stream) -> None:
    writer = together(stream)
    writer.write(b"too late")
    stream.close()
    await asyncio.sleep(0)
    writer.write(b"later still")
    await asyncio.sleep(0)
    assert stream.sent == []


async def test_in_all_else_it_is_the_stream(stream: Stream) -> None:
    writer = together(stream)
    assert writer.limit == 7
    assert not writer.is_closing()
    stream.close()
    assert writer.is_closing()
