"""Counts of frontends reach the hub exactly once, even if connections break."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path

from hypothesis import example, given, settings
from hypothesis import strategies as st
from prometheus_client import generate_latest

from service.control.catalog import Catalog
from service.control.hub import Hub
from service.ipc.connection import DisconnectedError, Sender, listening
from service.ipc.control_messages import CatalogUpdate, ReportAcknowledged, Scrape
from service.ipc.frames import Message
from service.ipc.hub_client import HubLink
from service.settings import Settings
from tests.support.exposition import Exposition
from tests.support.waiting import until

PROPERTY = settings(max_examples=20, deadline=None, derandomize=True, database=None)
SCRAPE = Scrape(0, False)
ACTIONS = ["count", "report", "begin", "break", "lose", "keep"]


class LossyHub(Hub):
    """A hub whose acknowledgements are lost while `loses` is set."""

    loses = False

    async def serve_frontend(self, reader: asyncio.StreamReader, send: Sender) -> None:
        def say_unless_lost(message: Message) -> bool:
            lost = self.loses and isinstance(message, ReportAcknowledged)
            return lost or send(message)

        await super().serve_frontend(reader, say_unless_lost)

    def counted(self) -> float:
        """Return the number of connections that were counted as malformed."""
        shown = Exposition(generate_latest(self.metrics.registry).decode())
        return shown.total("broken_connections_total", reason="malformed")


def empty_hub(folder: Path) -> LossyHub:
    given = Settings(model_store=folder)
    return LossyHub(given, Catalog(given), [])


@asynccontextmanager
async def frontend(socket: Path) -> AsyncIterator[HubLink]:
    async def serve(_: CatalogUpdate) -> None:
        return

    to_hub = HubLink(socket, serve, ["/classify"])
    to_hub.send_keys(["one"])
    await to_hub.start()
    yield to_hub
    await to_hub.stop()


@PROPERTY
@given(st.lists(st.tuples(st.sampled_from(ACTIONS), st.integers(0, 1)), max_size=20))
@example([("count", 0), ("lose", 0), ("report", 0), ("break", 0), ("report", 0)])
@example([("count", 0), ("begin", 0), ("break", 0), ("count", 0), ("report", 0)])
def test_no_count_is_lost_or_doubled_when_connections_break(
    actions: list[tuple[str, int]],
) -> None:
    asyncio.run(_count_once(actions))


async def _count_once(actions: list[tuple[str, int]]) -> None:
    with tempfile.TemporaryDirectory(prefix="bf-") as folder:
        socket, hub = Path(folder) / "hub.sock", empty_hub(Path(folder))
        async with (
            listening(socket, hub.serve_frontend),
            frontend(socket) as one,
            frontend(socket) as other,
        ):
            reports: list[asyncio.Task[None]] = []
            for action, index in actions:
                to_hub = (one, other)[index]
                match action:
                    case "count":
                        to_hub.counts.connection_ended("malformed")
                    case "report":
                        await _report(to_hub)
                    case "begin":
                        reports.append(asyncio.create_task(_report(to_hub)))
                        await asyncio.sleep(0)
                    case "break":
                        to_hub.close()
                    case _:
                        hub.loses = action == "lose"
            await asyncio.gather(*reports)
            hub.loses = False
            total = sum(action == "count" for action, _ in actions)
            await until(lambda: hub.counted() >= total, "all counts")
            for to_hub in (one, other):
                to_hub.close()
                await _report(to_hub)
            assert hub.counted() == total


async def _report(to_hub: HubLink) -> None:
    """Send a scrape, which also sends the counts; the connection may break meanwhile."""
    await until(lambda: to_hub.connected, "a connection")
    with suppress(DisconnectedError):
        await to_hub.query(SCRAPE)


async def test_a_new_hub_gets_the_counts_that_the_old_one_did_not_acknowledge() -> None:
    with tempfile.TemporaryDirectory(prefix="bf-") as folder:
        socket = Path(folder) / "hub.sock"
        before, after = empty_hub(Path(folder)), empty_hub(Path(folder))
        async with AsyncExitStack() as stack:
            async with listening(socket, before.serve_frontend):
                to_hub = await stack.enter_async_context(frontend(socket))
                for count in (3, 4):
                    for _ in range(count):
                        to_hub.counts.connection_ended("malformed")
                    await to_hub.query(SCRAPE)
                    before.loses = True
                assert before.counted() == 7
            to_hub.counts.texts_asked("one", 2)
            await stack.enter_async_context(listening(socket, after.serve_frontend))
            await until(lambda: after.counted() > 0, "what was not acknowledged")
            await to_hub.query(SCRAPE)
        shown = Exposition(generate_latest(after.metrics.registry).decode())
        assert after.counted() == 4
        assert shown.by("key", "key_texts_total") == {"one": 2}, "it knows the keys"
