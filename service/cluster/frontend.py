"""A frontend as a replica of a Ray Serve deployment, and its client of the engines."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import structlog
from fastapi import FastAPI
from grpc.aio import AioRpcError
from ray.exceptions import RayActorError
from ray.serve.exceptions import DeploymentUnavailableError, ReplicaUnavailableError

from service.background import is_cancelled
from service.cluster.hub import FleetState
from service.cluster.pools import through_pools
from service.cluster.stream import Caller
from service.http.app import create_app
from service.ipc.answers import Answers
from service.ipc.engine_client import (
    GRACE_SECONDS,
    DeadlineError,
    EngineClient,
    EngineDownError,
    EngineFailedError,
    Engines,
    ModelKey,
    NotLoadedError,
    Submission,
    answers_of,
    request_of,
)
from service.ipc.engine_messages import TO_FRONTEND
from service.settings import Pool, Settings
from service.telemetry.logs import configure_logs
from service.telemetry.traces import open_tracing

log = structlog.get_logger()

POLL_SECONDS, POLL_TIMEOUT = 1.0, 10.0
"""Interval and time limit of polling the hub for the list of engines."""
ATTEMPTS = 4
"""Tries per request. When a host dies, several of its replicas may be chosen before Ray notices."""

_encode = msgspec.msgpack.Encoder().encode
_decode_fleet = msgspec.msgpack.Decoder(FleetState).decode


@dataclass(frozen=True)
class PoolHandle:
    """A pool of engines, and the handle of its deployment."""

    pool: Pool
    handle: Any


class PooledEngines(Engines):
    """All engines of the cluster, called through Ray.

    Each text goes to the first pool that computes its step; see `through_pools`.

    Args:
        pools: pools by rising `max_step`.
        hub: handle of the hub's deployment.
    """

    def __init__(self, pools: Sequence[PoolHandle], hub: Any) -> None:
        super().__init__([])
        self._pools = pools
        self._hub = hub
        self._wanted: list[ModelKey] = []

    def start(self) -> None:
        """Start polling the hub for the list of engines."""
        self._background.start(self._poll_hub())

    @property
    def models(self) -> set[ModelKey]:
        """Models that the hub wants and a live engine has, or loads on demand.

        Both are needed: the list of engines may be newer than the list of wanted models.
        """
        if self.alive and any(pool.pool.models for pool in self._pools):
            return set(self._wanted)
        return super().models & set(self._wanted)

    async def classify(self, submission: Submission) -> Answers:
        """Classify texts; see `Engines.classify`.

        Ray knows which replicas run; what the hub has heard of them may be out of date.
        """
        if not self.clients:
            raise EngineDownError
        if (submission.model, submission.version) not in self._wanted:
            raise NotLoadedError
        return await through_pools(
            self._request, [pool.pool.computes for pool in self._pools], submission
        )

    async def _request(self, index: int, submission: Submission) -> Answers:
        pool = self._pools[index]
        model = f"{submission.model}:{submission.version}"
        for attempt in range(1, ATTEMPTS + 1):
            message = request_of(submission)  # each attempt has less time left
            response = pool.handle.classify.remote(model, len(submission.texts), _encode(message))
            try:
                async with asyncio.timeout(message.remaining + GRACE_SECONDS):
                    reply = await response
            except TimeoutError as error:
                raise DeadlineError from error
            except (RayActorError, ReplicaUnavailableError, AioRpcError):
                log.warning("replica died with a request in flight", attempt=attempt)
            except asyncio.CancelledError:
                if is_cancelled():
                    raise
                log.warning("replica ended with a request in flight", attempt=attempt)
            except DeploymentUnavailableError as error:
                raise EngineDownError from error
            except Exception as error:  # errors of a replica are raised here with their own type
                log.error("replica failed", reason=type(error).__name__)
                raise EngineFailedError("an engine failed") from error
            else:
                return answers_of(TO_FRONTEND.decode(reply))
            finally:
                response.cancel()  # nothing waits for it after this attempt
        raise EngineDownError

    async def _poll_hub(self) -> None:
        while True:
            try:
                async with asyncio.timeout(POLL_TIMEOUT):
                    fleet = _decode_fleet(await self._hub.fleet.remote())
            except Exception as error:  # Ray raises many types of errors if the hub is down
                log.warning("engine list not received from the hub", reason=type(error).__name__)
            else:
                self._wanted = fleet.wanted
                self.clients = list(map(EngineClient.from_state, fleet.engines))
            await asyncio.sleep(POLL_SECONDS)


class FrontendReplica:
    """One frontend: the application of `service.http.app` in front of pools of engines.

    Args:
        settings: settings of the whole server, as `Settings.model_dump` returns them.
        hub: handle of the hub's deployment.
        handles: handles of the pools' deployments, in the order of `Settings.ordered_pools`.
    """

    def __init__(self, settings: dict[str, Any], hub: Any, *handles: Any) -> None:
        self._settings = Settings(**settings)
        self._hub = hub
        self._handles = handles
        configure_logs(self._settings.log_level, self._settings.log_format, "frontend")

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Create the application; Ray Serve runs its lifespan and calls it."""
        pools = self._settings.ordered_pools().values()
        handles = [PoolHandle(pool, h) for pool, h in zip(pools, self._handles, strict=True)]
        tracing = open_tracing("frontend")
        provider = tracing.provider if tracing else None
        engines = PooledEngines(handles, self._hub)
        return create_app(self._settings, engines, Caller(self._hub, "frontend"), provider)
