"""Make every call of Triton's gRPC client, and print the table of docs/compatibility.md.

    python loadtests/grpc_calls.py ADDRESS ADMIN_KEY [MODEL]

The model is unloaded and loaded again.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from queue import Queue
from typing import Any

import grpc
import numpy as np
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tritonclient.grpc import InferenceServerClient, InferInput, InferRequestedOutput
from tritonclient.utils import InferenceServerException

TEXTS = ["Shares fell after the report.", "The home side won."]


def rows_of(address: str, key: str, model: str) -> Iterator[tuple[str, str]]:
    """Make every call; yield the call and its result."""
    client = InferenceServerClient(address)
    admin = {"authorization": f"Bearer {key}"}
    texts = InferInput("text", [2, 1], "BYTES")
    texts.set_data_from_numpy(np.array([[text] for text in TEXTS], dtype=np.object_))

    def values(name: str, count: int = 0, **options: Any) -> str:
        outputs = [InferRequestedOutput(name, class_count=count)]
        rows = client.infer(model, [texts], outputs=outputs, **options).as_numpy(name)
        return "; ".join(", ".join(_shown(value) for value in row) for row in rows)

    def asynchronous() -> str:
        answers: Queue[Any] = Queue()
        client.async_infer(model, [texts], lambda result, error: answers.put(result or error))
        answer = answers.get(timeout=60)
        if isinstance(answer, InferenceServerException):
            raise answer
        return "; ".join(map(_shown, answer.as_numpy("label").ravel()))

    def health() -> str:
        with grpc.insecure_channel(address) as channel:
            answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
        return str(health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status))

    def stream() -> None:
        answers: Queue[Any] = Queue()
        client.start_stream(lambda result, error: answers.put(result or error))
        with suppress(InferenceServerException):  # the server may have closed the stream already
            client.async_stream_infer(model, [texts])
        raise answers.get(timeout=60)

    calls: dict[str, Callable[[], Any]] = {
        "`is_server_live()`": client.is_server_live,
        "`is_server_ready()`": client.is_server_ready,
        "`is_model_ready(model)`": partial(client.is_model_ready, model),
        '`is_model_ready("nothing")`': partial(client.is_model_ready, "nothing"),
        "`get_server_metadata()`": lambda: ", ".join(client.get_server_metadata().extensions),
        "`get_model_metadata(model)`": lambda: ", ".join(
            one.name for one in client.get_model_metadata(model).outputs
        ),
        "`get_model_config(model)`": lambda: (
            f"`max_batch_size` {client.get_model_config(model).config.max_batch_size}"
        ),
        "`infer`, output `label`": partial(values, "label"),
        "`infer`, output `probs`, `class_count=2`": partial(values, "probs", 2),
        '`infer`, output `heads`, `parameters={"quality": "best"}`': partial(
            values, "heads", parameters={"quality": "best"}
        ),
        '`infer`, `compression_algorithm="gzip"`': partial(
            values, "label", compression_algorithm="gzip"
        ),
        "`infer`, `timeout=1` (microsecond)": partial(
            values, "heads", timeout=1, parameters={"heads": 12}
        ),
        "`async_infer(...)`": asynchronous,
        "`get_model_repository_index()`": lambda: ", ".join(
            f"{one.name} {one.state}" for one in client.get_model_repository_index().models
        ),
        "`unload_model(model)` without a key": partial(client.unload_model, model),
        "`unload_model(model)`": partial(client.unload_model, model, headers=admin),
        "`infer` meanwhile": partial(values, "label"),
        "`load_model(model)`": partial(client.load_model, model, headers=admin),
        "`load_model(model, config=...)`": partial(
            client.load_model, model, headers=admin, config="{}"
        ),
        "`async_stream_infer(...)`": stream,
        "`get_inference_statistics()`": client.get_inference_statistics,
        "`get_system_shared_memory_status()`": client.get_system_shared_memory_status,
        "`get_trace_settings()`": client.get_trace_settings,
        "`get_log_settings()`": client.get_log_settings,
        "`grpc.health.v1`, `Check`": health,
    }
    for name, call in calls.items():
        try:
            answer = call()
        except InferenceServerException as error:
            answer = f"{error.status().removeprefix('StatusCode.')}: {error.message()}"
        yield name, "nothing" if answer is None else str(answer)


def _shown(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def main() -> None:
    address, key, *rest = sys.argv[1:]
    print("| call | result |\n|---|---|")
    for row in rows_of(address, key, *(rest or ["ag_news"])):
        print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    main()
