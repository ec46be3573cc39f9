"""The whole service in one event loop: frontends, engines and hub, connected by sockets."""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
from fastapi import FastAPI
from opentelemetry.trace import TracerProvider

from budgetformer.inference.packed import PackedPass, PackedTokens, PassResult
from service.control.catalog import Catalog
from service.control.hub import Hub
from service.engine.core import EngineCore, EngineOptions
from service.engine.server import EngineServer
from service.http.app import create_app
from service.ipc.engine_client import Engines
from service.jobs.process import JobProcess
from service.process import engine_socket, hub_socket
from service.settings import Settings
from tests.support.exposition import Exposition
from tests.support.waiting import until

ADMIN_KEY = "open-sesame"
ADMIN = {"Authorization": f"Bearer {ADMIN_KEY}"}
ERROR_FIELDS = {"message", "type", "param", "code"}


@dataclass
class Service:
    """A running service, a client of its first frontend, and one of each other frontend."""

    app: FastAPI
    client: httpx.AsyncClient
    cores: list[EngineCore]
    hub: Hub
    other_clients: list[httpx.AsyncClient]
    run_dir: Path

    @property
    def core(self) -> EngineCore:
        """The only engine."""
        (core,) = self.cores
        return core

    async def ask(self, given: Any, **fields: Any) -> httpx.Response:
        """Send a request to classify."""
        return await self.client.post("/classify", json={"input": given, **fields})

    async def answer(self, given: Any, **fields: Any) -> dict[str, Any]:
        """Return the answer of a request that succeeds."""
        response = await self.ask(given, **fields)
        assert response.status_code == 200, response.text
        body = response.json()
        assert isinstance(body, dict)
        return body

    async def item(self, text: Any, **fields: Any) -> dict[str, Any]:
        """Return the answer for a single item."""
        (item,) = (await self.answer(text, **fields))["data"]
        assert isinstance(item, dict)
        return item

    async def scrape(self) -> Exposition:
        """Read all metrics."""
        return Exposition((await self.client.get("/metrics")).text)

    async def ready(self) -> bool:
        """Ask whether the service can classify."""
        return (await self.client.get("/health/ready")).status_code == 200

    def in_flight(self) -> int:
        """Count the items that the engines have not answered yet."""
        return sum(sum(core.heartbeat(0).in_flight.values()) for core in self.cores)


def error_of(
    response: httpx.Response, status: int, code: str | None = None, param: str | None = None
) -> dict[str, Any]:
    """Check that an answer is an error in the service's format, and return its object."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    body = response.json()
    assert set(body) == {"error"}
    error = body["error"]
    assert set(error) == ERROR_FIELDS
    assert isinstance(error["message"], str)
    assert isinstance(error["type"], str)
    assert isinstance(error["code"], str)
    assert error["message"]
    assert "Traceback" not in error["message"]
    assert response.headers["x-request-id"]
    if code is not None:
        assert error["code"] == code
    if param is not None:
        assert error["param"] == param
    if status in (429, 503):
        assert int(response.headers["retry-after"]) >= 1
    return dict(error)


@asynccontextmanager
async def engine(socket: Path, options: EngineOptions | None = None) -> AsyncIterator[EngineCore]:
    """Run an engine that listens on a socket."""
    core = EngineCore(options or EngineOptions())
    serving = asyncio.create_task(EngineServer(core).serve(socket))
    try:
        yield core
    finally:
        serving.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await serving


@asynccontextmanager
async def hub(settings: Settings, sockets: list[Path], socket: Path) -> AsyncIterator[Hub]:
    """Run a hub that listens on a socket."""
    running = Hub(settings, Catalog(settings), sockets)
    serving = asyncio.create_task(running.serve(socket))
    try:
        yield running
    finally:
        serving.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await serving


@asynccontextmanager
async def application(
    settings: Settings, sockets: list[Path], hub_socket: Path, tracer: TracerProvider | None = None
) -> AsyncIterator[FastAPI]:
    """Run an application, without HTTP."""
    app = create_app(settings, Engines(sockets), hub_socket, tracer)
    async with app.router.lifespan_context(app):
        yield app


@asynccontextmanager
async def service(
    store: Path,
    *,
    engines: int = 1,
    fronts: int = 1,
    options: EngineOptions | None = None,
    wait: bool = True,
    tracer_provider: TracerProvider | None = None,
    **settings: Any,
) -> AsyncIterator[Service]:
    """Run a service over a store, ready for requests."""
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bf-")))
        own = {"model_store": store, "default_model": "topics", "state_dir": folder / "state"}
        chosen: dict[str, Any] = own | {"admin_key": ADMIN_KEY} | settings
        sockets = [engine_socket(folder, index) for index in range(max(engines, 1))]
        cores = [
            await stack.enter_async_context(engine(socket, options)) for socket in sockets[:engines]
        ]
        hub_path = hub_socket(folder)
        running_hub = await stack.enter_async_context(hub(Settings(**chosen), sockets, hub_path))
        apps, clients = [], []
        for _ in range(fronts):
            app = await stack.enter_async_context(
                application(Settings(**chosen), sockets, hub_path, tracer_provider)
            )
            transport = httpx.ASGITransport(app, raise_app_exceptions=False)
            apps.append(app)
            clients.append(
                await stack.enter_async_context(
                    httpx.AsyncClient(transport=transport, base_url="http://service", timeout=60)
                )
            )
        running = Service(apps[0], clients[0], cores, running_hub, clients[1:], folder)
        if wait and engines:
            await until(running.ready, "readiness")
            await until(lambda: _all_loaded(running), "every model in every engine")
        yield running


@asynccontextmanager
async def job_process(running: Service) -> AsyncIterator[None]:
    """Run the process for jobs in this event loop."""
    settings: Settings = running.app.state.shared.settings
    known = settings.model_copy(update={"engines": len(running.cores)})
    process = JobProcess(known, running.run_dir)
    work = asyncio.create_task(process.run())
    try:
        # A thread that still reads a model would write into a folder that the test removes.
        await until(lambda: process.models.all(), "the models of the process that runs jobs")
        yield
    finally:
        work.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await work


def _all_loaded(running: Service) -> bool:
    served = running.app.state.shared.models.all()
    return all(len(core.models) == len(served) for core in running.cores)


@contextmanager
def held(core: EngineCore) -> Iterator[None]:
    """Let the device of an engine finish nothing before the end of this block."""
    gate = threading.Event()

    def wait() -> None:
        gate.wait(60)

    with contextlib.ExitStack() as stack:
        for model in core.models.values():
            stack.enter_context(_before(model.network, wait))
        stack.callback(gate.set)
        yield


@contextmanager
def _before(network: PackedPass, act: Callable[[], None]) -> Iterator[None]:
    decide, run = network.decide, network.run

    def later(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            act()
            return method(*arguments, **named)

        return call

    with _replaced(network, decide=later(decide), run=later(run)):
        yield


@contextmanager
def poison(network: PackedPass, tokens: int, how: str) -> Iterator[None]:
    """Let every item with this number of tokens fail, by an exception or by NaN."""
    run = network.run

    def poisoned(packed: PackedTokens, *arguments: Any) -> PassResult:
        if tokens in packed.lengths and how == "raise":
            raise RuntimeError("the text of the item would be here")
        result = run(packed, *arguments)
        logits = result.logits.clone()
        for place, length in enumerate(packed.lengths):
            if length == tokens:
                logits[place] = float("nan")
        return replace(result, logits=logits)

    with _replaced(network, run=poisoned):
        yield


@contextmanager
def _replaced(network: PackedPass, **methods: Callable[..., Any]) -> Iterator[None]:
    before = {name: vars(network).get(name) for name in methods}
    vars(network).update(methods)
    try:
        yield
    finally:
        for name, method in before.items():
            if method is None:
                del vars(network)[name]
            else:
                vars(network)[name] = method
