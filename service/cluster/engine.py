"""An engine as a replica of a Ray Serve deployment."""

from __future__ import annotations

import asyncio
import contextlib
import time
from pathlib import Path
from typing import Any

import msgspec
import structlog
import torch

from service.background import Background
from service.cluster.stream import Caller
from service.engine.requests import Reply
from service.engine.server import EngineServer, core_of
from service.ipc.connection import RECONNECT_SECONDS, serve_streams
from service.ipc.engine_client import ModelKey
from service.ipc.engine_messages import (
    TO_ENGINE,
    Cancel,
    Classify,
    Done,
    Failed,
    Load,
    ToEngine,
    ToFrontend,
    Unload,
)
from service.settings import Pool, Settings
from service.telemetry.logs import configure_logs
from service.telemetry.traces import open_tracing

log = structlog.get_logger()

_encode = msgspec.msgpack.Encoder().encode


class EngineReplica:
    """One engine of a pool, which receives requests through Ray and connects to the hub.

    Args:
        settings: settings of the whole server, as `Settings.model_dump` returns them.
        pool: settings of its pool, as `Pool.model_dump` returns them.
        name: name of the pool.
        hub: handle of the hub's deployment.
    """

    def __init__(self, settings: dict[str, Any], pool: dict[str, Any], name: str, hub: Any) -> None:
        self._settings, self._pool = Settings(**settings), Pool(**pool)
        configure_logs(self._settings.log_level, self._settings.log_format, f"engine-{name}")
        torch.set_num_threads(self._settings.threads_per_engine)
        device = "cuda" if self._pool.gpus else "cpu"
        core = core_of(self._settings, device, self._pool.max_step)
        tracing = open_tracing(f"engine-{name}", follow=True)
        if tracing is not None:
            core.spans = tracing.pass_spans()
        self._core = core
        self._server = EngineServer(core, self._settings.hang_seconds)
        self._server.receive = self._receive
        self._used: dict[ModelKey, float] = {}
        self._loading: dict[ModelKey, asyncio.Task[None]] = {}
        self._items = 0
        self._measured = {"routing": (0.0, 0.0, 0), "scaling": (time.monotonic(), 0.0, 0)}
        self._item_seconds = 0.0
        self._background = Background()
        self._work = asyncio.create_task(self._server.work())
        self._background.start(self._stay_connected(Caller(hub, "engine")))

    async def classify(self, model: str, items: int, frame: bytes) -> bytes:  # noqa: ARG002
        """Answer a `Classify` message.

        Args:
            model: model version, as `name:version`, for the router.
            items: number of items in the message, for the router.
            frame: the encoded message.

        Returns:
            The encoded answer.
        """
        message = TO_ENGINE.decode(frame)
        if not isinstance(message, Classify):
            raise TypeError("only Classify messages can be sent to a replica")
        await self._ensure_loaded((message.model, message.version))
        self._items += items
        return _encode(await self._ask(message))

    def record_routing_stats(self) -> dict[str, Any]:
        """Return the report for routers: waiting time, mean time of an item, loaded models."""
        computed, items = self._since("routing")[1:]
        if items:
            self._item_seconds = computed / items
        return {
            "word": time.monotonic(),
            "seconds": self._core.queued_seconds,
            "item_seconds": self._item_seconds,
            "models": [f"{name}:{version}" for name, version in self._core.models],
        }

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Return the report for the autoscaler: waiting time, and share of busy time."""
        seconds, computed, _ = self._since("scaling")
        busy = min(1.0, computed / seconds) if seconds else 0.0
        return {"queue_seconds": self._core.queued_seconds, "busy": busy}

    def check_health(self) -> None:
        """Check whether this replica still works; Ray replaces it otherwise.

        Raises:
            RuntimeError: a pass hangs, or the core has ended.
        """
        if self._server.hangs or self._work.done():
            raise RuntimeError("this engine has stopped computing")

    async def stop(self) -> None:
        """Stop the engine."""
        self._work.cancel()
        await asyncio.gather(self._work, return_exceptions=True)
        await self._background.stop()

    async def _ask(self, message: Classify | Load | Unload) -> ToFrontend:
        answer: asyncio.Future[ToFrontend] = asyncio.get_running_loop().create_future()

        def reply(message: ToFrontend) -> None:
            if not answer.done():
                answer.set_result(message)

        self._core.receive(message, reply)
        try:
            return await answer
        except asyncio.CancelledError:
            self._core.receive(Cancel(message.id), reply)
            raise

    def _since(self, consumer: str) -> tuple[float, float, int]:
        """Return elapsed seconds, computed seconds and items since the consumer's last report."""
        now = (time.monotonic(), self._core.computed_seconds, self._items)
        before, self._measured[consumer] = self._measured[consumer], now
        return now[0] - before[0], now[1] - before[1], now[2] - before[2]

    async def _stay_connected(self, caller: Caller) -> None:
        while True:
            with contextlib.suppress(ConnectionError):
                await serve_streams(await caller(), self._server.serve_connection, "hub")
            await asyncio.sleep(RECONNECT_SECONDS)

    # Models: the hub decides which to load. If `Pool.models` is lower, others load on request

    def _receive(self, message: ToEngine, reply: Reply) -> None:
        if isinstance(message, Load) and self._full and not self._is_update(Path(message.path)):
            reply(Done(message.id))  # the model is loaded at its first request
        else:
            self._core.receive(message, reply)

    @property
    def _full(self) -> bool:
        return self._pool.models is not None and len(self._core.models) >= self._pool.models

    def _is_update(self, folder: Path) -> bool:
        """Return whether the folder is another version of a loaded model."""
        return folder.parent.name in {name for name, _ in self._core.models}

    async def _ensure_loaded(self, key: ModelKey) -> None:
        """Load a model if it is not loaded, in place of the least recently used one."""
        if key not in self._core.models:
            if key not in self._loading:
                self._loading[key] = asyncio.create_task(self._load(key))
            await asyncio.shield(self._loading[key])
        self._used[key] = time.monotonic()

    async def _load(self, key: ModelKey) -> None:
        models = self._core.models
        try:
            while self._full:
                oldest = min(models, key=lambda loaded: self._used.get(loaded, 0.0))
                await self._ask(Unload(0, *oldest))
            folder = Path(self._settings.model_store, key[0], str(key[1]))
            async with asyncio.timeout(self._settings.load_timeout_seconds):
                answer = await self._ask(Load(0, str(folder)))
            if isinstance(answer, Failed):
                log.error("model not loaded", model=key[0], reason=answer.message)
        finally:
            del self._loading[key]
            self._used = {loaded: self._used.get(loaded, 0.0) for loaded in models}
