"""A real server over gRPC: calls of Triton's client, probes, failures, TLS and shutdown."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import numpy as np
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tritonclient import http as triton_http
from tritonclient.grpc import (
    InferenceServerClient,
    InferRequestedOutput,
    InferResult,
)
from tritonclient.utils import InferenceServerException

from tests.support.calling import tensor, texts_input
from tests.support.certificates import make_certificate
from tests.support.processes import COMMAND, Server, clean_environment, free_port, server
from tests.support.serving import ADMIN_KEY
from tests.support.stores import LABELS, PAIRS, TOPICS, sentences
from tests.support.waiting import wait_until

pytestmark = pytest.mark.timeout(300)

TEXTS = [sentences(label)[7] for label in LABELS]
BODY_BYTES = 500_000


@pytest.fixture(scope="module")
def address() -> str:
    return f"127.0.0.1:{free_port()}"


@pytest.fixture(scope="module")
def called(
    model_store: Path, address: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """Return a server with two frontends that answers calls on `address`."""
    options = {
        "grpc_port": address.partition(":")[2],
        "fronts": "2",
        "default_model": TOPICS,
        "admin_key": ADMIN_KEY,
        "quality_floor": "balanced",
        "max_body_bytes": str(BODY_BYTES),
    }
    with server(model_store, tmp_path_factory.mktemp("called"), engines=1, **options) as running:
        yield running


@pytest.fixture
def client(called: Server, address: str) -> Iterator[InferenceServerClient]:
    with new_client(address) as connected:
        assert called.ready()
        yield connected


def new_client(address: str) -> InferenceServerClient:
    """Return a client with its own connection; by default, gRPC shares connections."""
    own_connection = [("grpc.use_local_subchannel_pool", 1)]
    return InferenceServerClient(address, channel_args=own_connection)


def infer(client: InferenceServerClient, texts: list[str] = TEXTS) -> InferResult:
    return client.infer(TOPICS, [texts_input(texts)])


def test_every_supported_call_is_answered(called: Server, client: InferenceServerClient) -> None:
    admin = {"authorization": f"Bearer {ADMIN_KEY}"}
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready(TOPICS)
    assert "classification" in client.get_server_metadata().extensions
    assert client.get_model_metadata(TOPICS).name == TOPICS
    assert client.get_model_config(TOPICS).config.name == TOPICS
    assert (PAIRS, "READY") in {
        (one.name, one.state) for one in client.get_model_repository_index().models
    }
    client.unload_model(PAIRS, headers=admin)
    wait_until(lambda: not client.is_model_ready(PAIRS), "the end of a model")
    client.load_model(PAIRS, headers=admin)
    wait_until(lambda: client.is_model_ready(PAIRS), "a model")
    assert len(infer(client).as_numpy("label")) == len(TEXTS)
    wait_until(
        lambda: bool(called.scrape().total("requests_total", route="grpc ModelInfer")), "a count"
    )


def test_infer_answers_like_http(called: Server, client: InferenceServerClient) -> None:
    names = ("label", "probs", "heads", "budget", "macs", "steps")
    outputs = [InferRequestedOutput(name) for name in names]
    tensor = texts_input(TEXTS)
    result = client.infer(TOPICS, [tensor], outputs=outputs, request_id="mine-7")
    assert result.get_response().id == "mine-7"
    http_tensor = triton_http.InferInput("text", [len(TEXTS), 1], "BYTES")
    http_tensor.set_data_from_numpy(np.array(TEXTS, np.object_).reshape(-1, 1))
    with triton_http.InferenceServerClient(called.url.removeprefix("http://")) as http:
        expected = http.infer(TOPICS, [http_tensor])
    for name in names:
        np.testing.assert_array_equal(result.as_numpy(name), expected.as_numpy(name))


def test_kubernetes_probes_are_answered(called: Server, address: str) -> None:
    assert called.ready()
    with grpc.insecure_channel(address) as channel:
        answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
    assert answer.status == health_pb2.HealthCheckResponse.SERVING


def test_asynchronous_calls_invoke_their_callback(client: InferenceServerClient) -> None:
    done: list[tuple[InferResult | None, InferenceServerException | None]] = []
    inputs = [texts_input(TEXTS)]
    client.async_infer(TOPICS, inputs, lambda result, error: done.append((result, error)))
    wait_until(lambda: bool(done), "an answer")
    ((result, error),) = done
    assert error is None
    assert result is not None
    assert len(result.as_numpy("label")) == len(TEXTS)


def test_invalid_calls_do_not_affect_other_callers(
    called: Server, client: InferenceServerClient, address: str
) -> None:
    host, _, port = address.partition(":")
    with (
        ThreadPoolExecutor(1) as pool,
        new_client(address) as hostile,
        socket.create_connection((host, int(port))) as raw,
    ):
        others = pool.submit(lambda: [infer(client) for _ in range(20)])
        raw.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" + bytes(100_000))
        with pytest.raises(InferenceServerException, match="larger than max"):
            infer(hostile, ["a" * BODY_BYTES])
        with pytest.raises(InferenceServerException, match="must be from 0"):
            hostile.infer(TOPICS, [tensor("input_ids", np.full((1, 4), 2**31), "INT64")])
        for result in others.result():
            assert len(result.as_numpy("label")) == len(TEXTS)
    assert called.scrape().total("engine_restarts_total") == 0


def test_a_killed_frontend_is_replaced(called: Server, address: str) -> None:
    def frontend() -> psutil.Process:
        return next(c for c in called.children if "service.frontend" in c.cmdline())

    killed = frontend()
    killed.kill()
    killed.wait(30)  # until its sockets are closed, which reset the connections that they hold

    def asks() -> bool:
        try:
            with new_client(address) as client:
                return len(infer(client).as_numpy("label")) == len(TEXTS)
        except InferenceServerException:
            return False

    wait_until(asks, "a frontend that answers")
    called.wait_ready(1)
    assert all(asks() for _ in range(20))


def test_running_calls_are_answered_before_a_stop(model_store: Path, tmp_path: Path) -> None:
    port = free_port()
    options = {"default_model": TOPICS, "grpc_port": str(port)}
    with (
        server(model_store, tmp_path, engines=1, **options) as running,
        InferenceServerClient(f"127.0.0.1:{port}") as client,
        ThreadPoolExecutor(1) as pool,
    ):
        inputs, parameters = [texts_input(TEXTS)], {"heads": 4}
        client.infer(TOPICS, inputs, parameters=parameters)
        engine = psutil.Process(running.engines()[0])
        engine.send_signal(signal.SIGSTOP)
        answer = pool.submit(client.infer, TOPICS, inputs, parameters=parameters)
        wait_until(lambda: running.in_flight() == len(TEXTS), "a call in flight")
        running.process.send_signal(signal.SIGTERM)
        wait_until(lambda: not accepts(port), "a closed port")
        engine.send_signal(signal.SIGCONT)
        assert len(answer.result().as_numpy("label")) == len(TEXTS)
        assert running.process.wait(60) == 0


def accepts(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port)).close()
    except ConnectionRefusedError:
        return False
    return True


def test_tls_requires_client_certificates(
    model_store: Path, certificate: Path, tmp_path: Path
) -> None:
    port, probes = free_port(), free_port()
    chain, key = certificate / "chain.pem", certificate / "key.pem"
    options = {
        "tls_cert": str(chain),
        "tls_key": str(key),
        "tls_client_ca": str(chain),
        "metrics_port": str(probes),
        "grpc_port": str(port),
        "default_model": TOPICS,
    }
    url, address = f"http://127.0.0.1:{probes}", f"127.0.0.1:{port}"
    with server(model_store, tmp_path, engines=1, probes=url, **options) as running:
        own = {"private_key": str(key), "certificate_chain": str(chain)}
        with InferenceServerClient(
            address, ssl=True, root_certificates=str(chain), **own
        ) as client:
            assert len(infer(client).as_numpy("label")) == len(TEXTS)
        for options in ({}, {"ssl": True, "root_certificates": str(chain)}):
            with (
                InferenceServerClient(address, **options) as client,
                pytest.raises(InferenceServerException, match="UNAVAILABLE"),
            ):
                infer(client)
        lines = running.log.read_text().splitlines()
        assert lines == [line for line in lines if line.startswith("{")]


def test_a_reload_renews_the_certificate(model_store: Path, tmp_path: Path) -> None:
    first, second, used = (tmp_path / name for name in ("first", "second", "used"))
    make_certificate(first)
    make_certificate(second)
    shutil.copytree(first, used)
    port, probes = free_port(), free_port()
    options = {
        "tls_cert": str(used / "chain.pem"), "tls_key": str(used / "key.pem"),
        "metrics_port": str(probes), "grpc_port": str(port), "default_model": TOPICS,
    }  # fmt: skip

    def connect(folder: Path) -> InferenceServerClient:
        return InferenceServerClient(
            f"127.0.0.1:{port}",
            ssl=True,
            root_certificates=str(folder / "chain.pem"),
            channel_args=[("grpc.use_local_subchannel_pool", 1)],
        )

    url = f"http://127.0.0.1:{probes}"
    with server(model_store, tmp_path, engines=1, probes=url, **options) as running:
        with connect(first) as before:
            assert len(infer(before).as_numpy("label")) == len(TEXTS)
            shutil.copytree(second, used, dirs_exist_ok=True)
            running.process.send_signal(signal.SIGHUP)
            wait_until(lambda: "settings reloaded" in running.log.read_text(), "the reload")
            assert len(infer(before).as_numpy("label")) == len(TEXTS), "open connections stay"
        with connect(second) as after:
            assert len(infer(after).as_numpy("label")) == len(TEXTS)
        with connect(first) as late, pytest.raises(InferenceServerException, match="UNAVAILABLE"):
            infer(late)


def test_a_port_in_use_is_an_error(model_store: Path, called: Server, address: str) -> None:
    assert called.ready()
    arguments = [f"--model-store={model_store}", f"--grpc-port={address.partition(':')[2]}"]
    done = subprocess.run(
        [*COMMAND, *arguments, "--port=0"], env=clean_environment(), capture_output=True, text=True
    )
    assert done.returncode == 2
    assert f"cannot listen on {address}: Address already in use" in done.stderr
    assert "Traceback" not in done.stderr
