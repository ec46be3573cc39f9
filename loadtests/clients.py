"""Call a server with every supported client: `python loadtests/clients.py URL [MODEL]`.

Prints the table of docs/compatibility.md: client, version, call and result. A call that fails ends
the program.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from typing import Any

import httpx
import numpy as np
import tritonclient.http as triton
from huggingface_hub import AsyncInferenceClient, InferenceClient
from infinity_client import Client as InfinityClient
from infinity_client.api.default import classify as infinity_classify
from infinity_client.models import ClassifyInput

from budgetformer.client import Client, Failure

TEXTS = ["Shares fell after the report.", "The home side won."]


def rows_of(url: str, model: str) -> list[tuple[str, str, str, str]]:
    """Make every call; return rows of client, version, call and result."""
    rows: list[tuple[str, str, str, str]] = []

    def call(client: str, package: str | None, called: str, ask: Callable[[], str]) -> None:
        rows.append((client, version(package) if package else "its request", called, ask()))

    def best(answer: Any) -> str:
        return f"{answer[0]['label']} {answer[0]['score']:.3f}, {len(answer)} labels"

    def posted(path: str, body: dict[str, Any]) -> Any:
        response = httpx.post(f"{url}{path}", json=body, timeout=60)
        response.raise_for_status()
        return response.json()

    def classified(address: str) -> str:
        return best(InferenceClient(address).text_classification(TEXTS[0]))

    hub = "huggingface_hub"
    for path in ("", "/predict"):
        call(
            "InferenceClient", hub, f"`text_classification` on `{path or '/'}`",
            partial(classified, f"{url}{path}"),
        )  # fmt: skip

    async def asynchronous() -> Any:
        async with AsyncInferenceClient(url) as client:
            return await client.text_classification(TEXTS[0], top_k=1)

    call(
        "AsyncInferenceClient", hub, "`text_classification`, `top_k=1`",
        lambda: best(asyncio.run(asynchronous())),
    )  # fmt: skip
    call(
        "Text Embeddings Inference", None, "`POST /predict`, two texts",
        lambda: "; ".join(map(best, posted("/predict", {"inputs": [[t] for t in TEXTS]}))),
    )  # fmt: skip

    def vllm() -> str:
        body = posted("/classify", {"model": model, "input": TEXTS, "user": "someone"})
        return "; ".join(f"{i['label']} of {i['num_classes']}" for i in body["data"])

    call("vLLM", None, "`POST /classify`, two texts", vllm)

    def infinity() -> str:
        with InfinityClient(base_url=url, raise_on_unexpected_status=True) as client:
            answer: Any = infinity_classify.sync(client=client, body=ClassifyInput(input_=TEXTS))
        firsts = "; ".join(f"{row[0].label} {row[0].score:.3f}" for row in answer.data)
        return f"object `{answer.object_}`: {firsts}"

    call("Infinity", "infinity-client", "`classify.sync`, two texts", infinity)

    with triton.InferenceServerClient(url.removeprefix("http://")) as client:
        name = "tritonclient"

        def healthy() -> str:
            client.get_model_config(model)
            outputs = client.get_model_metadata(model)["outputs"]
            ready = client.is_server_ready() and client.is_model_ready(model)
            return f"ready: {ready}; outputs {', '.join(output['name'] for output in outputs)}"

        def infer(binary: bool) -> str:
            texts = np.array([[text] for text in TEXTS], dtype=object)
            tensor = triton.InferInput("text", [2, 1], "BYTES")
            tensor.set_data_from_numpy(texts, binary_data=binary)
            outputs = [triton.InferRequestedOutput("label", binary_data=binary)]
            labels = client.infer(model, [tensor], outputs=outputs).as_numpy("label").ravel()
            return "; ".join(v.decode() if isinstance(v, bytes) else v for v in labels)

        call("Triton (HTTP)", name, "health, `get_model_metadata`, `get_model_config`", healthy)
        call("", name, "`infer`, BYTES as binary data", lambda: infer(True))
        call("", name, "`infer`, BYTES as JSON", lambda: infer(False))
        call(
            "", name, "`get_model_repository_index`",
            lambda: ", ".join(sorted({row["name"] for row in client.get_model_repository_index()})),
        )  # fmt: skip
    call(
        "SageMaker", None, "`GET /ping`",
        lambda: str(httpx.get(f"{url}/ping").raise_for_status().status_code),
    )  # fmt: skip
    call(
        "", None, "`POST /invocations`",
        lambda: best(posted("/invocations", {"inputs": TEXTS[0]})),
    )  # fmt: skip

    def our_client() -> str:
        with Client(url) as client:
            results = client.classify(TEXTS)
            return "; ".join(r.message if isinstance(r, Failure) else r.label for r in results)

    call("budgetformer.client", "budgetformer-serving", "`classify`, two texts", our_client)
    return rows


def main() -> None:
    url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"
    model = sys.argv[2] if len(sys.argv) > 2 else "ag_news"
    print("| client | version | call | result |\n|---|---|---|---|")
    for row in rows_of(url, model):
        print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    main()
