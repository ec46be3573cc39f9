"""Connections between processes survive messages that fail, and bound data for stalled peers."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from service.background import Background
from service.ipc import connection, frames
from service.ipc import hub_client as link
from service.ipc.connection import Connection, DisconnectedError, Sender, handle_each, listening
from service.ipc.control_messages import (
    CatalogUpdate,
    Scrape,
)
from service.ipc.engine_messages import (
    TO_ENGINE,
    TO_FRONTEND,
    Cancel,
    Done,
    Expired,
    Failed,
    Load,
    Unload,
)
from service.ipc.hub_client import HubLink
from tests.support.stalled_hub import StalledHub
from tests.support.waiting import until

PROPERTY = settings(max_examples=25, deadline=None, derandomize=True, database=None)
ERRORS: tuple[type[Exception], ...] = (
    ValueError, KeyError, OSError, RecursionError, StopIteration, frames.FrameError, TimeoutError,
)  # fmt: skip


class Client(Connection):
    """A client that raises an error for each `Expired`, and counts them and its connections."""

    def __init__(self, socket: Path) -> None:
        super().__init__("server", socket, TO_FRONTEND)
        self.connections = self.expired = 0

    def _on_connect(self) -> None:
        self.connections += 1

    def _on_message(self, message: Any) -> None:
        if isinstance(message, Expired):
            self.expired += 1
            raise ERRORS[message.id % len(ERRORS)]
        super()._on_message(message)


@asynccontextmanager
async def connected(
    on_connect: Callable[[asyncio.StreamReader, Sender], Any],
) -> AsyncIterator[Client]:
    """Return the client of a server that calls `on_connect` for each connection."""
    with tempfile.TemporaryDirectory(prefix="bf-") as folder:
        socket = Path(folder) / "server.sock"
        async with listening(socket, on_connect):
            client, tasks = Client(socket), Background()
            tasks.start(client.stay_connected())
            await until(lambda: client.connected, "the connection")
            yield client
            await tasks.stop()


@PROPERTY
@given(st.lists(st.none() | st.sampled_from(ERRORS), max_size=30))
def test_messages_that_fail_do_not_affect_others(
    raised: list[type[Exception] | None],
) -> None:
    async def on_connect(reader: asyncio.StreamReader, send: Sender) -> None:
        def handle(message: Load | Unload | Cancel) -> None:
            # At the same time, the client fails to handle these messages.
            send(Expired(10**6 + message.id))
            if isinstance(message, Unload):
                raise ERRORS[message.version]
            send(Done(message.id))

        def failed(message: Load | Unload | Cancel, reason: str) -> None:
            send(Failed(message.id, reason))

        await handle_each(reader, TO_ENGINE, handle, failed, "client")

    async def run() -> None:
        async with connected(on_connect) as client:
            questions = [
                Load(0, "/") if error is None else Unload(0, "m", ERRORS.index(error))
                for error in raised
            ]
            with capture_logs() as lines:
                asked = [client.request(question, 30) for question in questions]
                answers = await asyncio.gather(*asked)
            for answer, error in zip(answers, raised, strict=True):
                assert isinstance(answer, Done if error is None else Failed)
                if error is not None:
                    assert error.__name__ in answer.message
            assert client.expired == len(raised)
            assert client.connections == 1, "the connection broke"
            logged = [(line["peer"], line["message"], type(line["exc_info"])) for line in lines]
            assert len(logged) == len(set(logged)), "each kind of error is logged once"
            expected = {("client", "Unload", error) for error in raised if error is not None}
            assert {line for line in logged if line[0] == "client"} == expected

    asyncio.run(run())


async def test_an_invalid_frame_ends_only_its_connection() -> None:
    async def on_connect(reader: asyncio.StreamReader, send: Sender) -> None:
        await handle_each(
            reader, TO_ENGINE, lambda message: send(Done(message.id)), lambda *_: None, "client"
        )

    async with connected(on_connect) as client:
        other = Client(client._address)  # type: ignore[arg-type]
        tasks = Background()
        tasks.start(other.stay_connected())
        await until(lambda: other.connected, "the other connection")
        client.send(Done(1))  # not a message to an engine
        await until(lambda: client.connections == 2, "another connection")
        assert await other.request(Load(0, "/"), 30) == Done(0)
        assert other.connections == 1
        await tasks.stop()


@pytest.fixture
def small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "MAX_REPORT_BYTES", 2**20)
    monkeypatch.setattr(connection, "MAX_UNSENT_BYTES", 2**22)


@pytest.mark.usefixtures("small_limits")
@pytest.mark.parametrize("droppable", [True, False])
async def test_unread_data_is_bounded(droppable: bool) -> None:
    """Reports are dropped; other messages may not be dropped, so their connection ends."""
    gate = asyncio.Event()

    async def on_connect(reader: asyncio.StreamReader, _: Sender) -> None:
        await gate.wait()
        await reader.read(1)

    class Report(frames.Message, frozen=True):
        text: str

    Report.droppable = droppable
    async with connected(on_connect) as client:
        sent = 0
        for _ in range(200):
            sent += client.send(Report("x" * 2**16))
            assert client.unsent <= (2**20 if droppable else 2**22) + 2**17
            await asyncio.sleep(0)
        if droppable:
            assert 0 < sent < 200
            assert client.connected
        else:
            await until(lambda: client.connections == 2, "another connection")
        gate.set()


@asynccontextmanager
async def linked(hub: StalledHub) -> AsyncIterator[HubLink]:
    """Return a frontend's connection to a hub that serves no models."""

    async def serve(_: CatalogUpdate) -> None:
        return

    with tempfile.TemporaryDirectory(prefix="bf-") as folder:
        socket = Path(folder) / "hub.sock"
        async with listening(socket, hub.came):
            to_hub = HubLink(socket, serve, ["/classify"])
            await to_hub.start()
            yield to_hub
            await to_hub.stop()


async def test_a_stalled_hub_neither_blocks_requests_nor_loses_counts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(link, "SILENCE_LIMIT", 1.5)
    hub = StalledHub()
    async with linked(hub) as to_hub:
        to_hub.send_keys(["one"])
        hub.reads.set()
        assert (await to_hub.query(Scrape(0, False))).content == b"series"
        hub.reads.clear()
        loop = asyncio.get_running_loop()
        for _ in range(3):
            for _ in range(100_000):
                to_hub.counts.connection_ended("malformed")
            began = loop.time()
            with pytest.raises(DisconnectedError):
                await to_hub.query(Scrape(0, False))
            assert loop.time() - began < 10
        assert to_hub.unsent < 1000
        hub.reads.set()

        def reported() -> float:
            series = "broken_connections", "malformed"
            return sum(report.difference.counters.get(series, 0) for report in hub.reports)

        await until(lambda: reported() == 300_000, "all counts")
        counted = [report.number for report in hub.reports if report.difference.counters]
        assert len(counted) <= 1 + link.MAX_UNACKNOWLEDGED
        assert hub.connections == 1, "the connection broke"
        assert hub.keys[-1] == ["one"]


async def test_a_slow_hub_does_not_block_requests(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(link, "QUERY_SECONDS", 0.5)
    hub = StalledHub(slow=True)
    hub.reads.set()
    async with linked(hub) as to_hub:
        with pytest.raises(DisconnectedError):
            await to_hub.query(Scrape(0, False))
        hub.slow = False
        assert (await to_hub.query(Scrape(0, False))).content == b"series"


async def test_a_failed_catalog_is_retried_and_then_the_newest_applied(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(link, "RETRY_SECONDS", 0.01)
    applied: list[int] = []
    tries = 0

    async def serve(serving: CatalogUpdate) -> None:
        nonlocal tries
        tries += 1
        if tries < 3:
            raise OSError("too many open files")
        applied.append(serving.generation)

    async def on_connect(reader: asyncio.StreamReader, send: Sender) -> None:
        for generation in range(1, 6):
            send(CatalogUpdate(generation, [], [], [], {}))
        await reader.read()

    with tempfile.TemporaryDirectory(prefix="bf-") as folder:
        socket = Path(folder) / "hub.sock"
        async with listening(socket, on_connect):
            to_hub = HubLink(socket, serve, [])
            await to_hub.start()
            await until(lambda: to_hub.catalog.generation == 5, "the newest")
            assert applied[-1] == 5
            assert tries >= 3
            await to_hub.stop()
