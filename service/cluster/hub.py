"""The hub as the only replica of a Ray Serve deployment."""

from __future__ import annotations

from collections.abc import AsyncIterator
from functools import partial
from typing import Any

import msgspec

from service.background import Background, run_forever
from service.cluster.stream import Switchboard
from service.control.catalog import Catalog
from service.control.hub import Hub
from service.control.mirror import copy_at_start, mirror_of
from service.control.poll import StorePoll
from service.ipc.connection import Streams, serve_streams
from service.ipc.engine_client import EngineState, ModelKey
from service.settings import Settings
from service.telemetry.logs import configure_logs


class FleetState(msgspec.Struct, frozen=True, array_like=True):
    """All engines, and the models that each must load at once or on request."""

    engines: list[EngineState]
    wanted: list[ModelKey]


class HubReplica:
    """The hub, for frontends and engines on any host.

    Args:
        settings: settings of the whole server, as `Settings.model_dump` returns them.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        checked = Settings(**settings)
        configure_logs(checked.log_level, checked.log_format, "hub")
        mirror = mirror_of(checked)
        if mirror is not None:
            copy_at_start(mirror)
        self._hub = Hub(checked, Catalog(checked), [])
        self._switchboard = Switchboard({"frontend": self._frontend, "engine": self._hub.fleet.add})
        self._background = Background()
        report = self._hub.report_problem
        self._background.start(run_forever("hub", self._hub.serve, report))
        if checked.poll_store_seconds:
            poll = StorePoll(self._hub, checked.models, mirror)
            run = partial(poll.run, checked.poll_store_seconds)
            self._background.start(run_forever("store", run, report))

    async def attach(self, kind: str, name: str) -> AsyncIterator[bytes]:
        """See `Switchboard.attach`."""
        async for chunk in self._switchboard.attach(kind, name):
            yield chunk

    async def feed(self, name: str, data: bytes) -> None:
        """See `Switchboard.feed`."""
        self._switchboard.feed(name, data)

    async def fleet(self) -> bytes:
        """Return an encoded `FleetState`."""
        hub = self._hub
        states = [client.state(hub.watch.in_flight(client.index)) for client in hub.fleet.clients]
        engines = [state for state in states if state is not None]
        return msgspec.msgpack.encode(FleetState(engines, list(hub.fleet.wanted)))

    async def _frontend(self, streams: Streams) -> None:
        await serve_streams(streams, self._hub.serve_frontend, "hub")
