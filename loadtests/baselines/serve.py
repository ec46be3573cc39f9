"""Serve the dense network with FastAPI, as a user could write it.

    python loadtests/baselines/serve.py int8 --port 8001 \\
        --network build/baselines/networks/ag_news-3

`pipeline` runs the network in Transformers' pipeline, one call per request, as its documentation
shows. `plain` (float32) and `int8` run it in ONNX Runtime with dynamic batching. `floor` only
parses and tokenizes. As in this service, the texts that arrive while a batch runs form the next
ones, in batches of similar lengths, so that there is little padding.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any

import uvicorn
from fastapi import FastAPI
from network import Network, arguments
from pydantic import BaseModel
from tokenizers import Encoding, Tokenizer

Answers = list[dict[str, Any]]


class Body(BaseModel):
    input: str | list[str]

    @property
    def texts(self) -> list[str]:
        return [self.input] if isinstance(self.input, str) else self.input


class Batcher:
    """Run waiting texts in batches of similar length.

    Args:
        run: answers tokenized texts; called in a thread.
        max_texts: maximum texts per batch.
    """

    def __init__(self, run: Callable[[Sequence[Encoding]], Answers], max_texts: int) -> None:
        self._run, self._max_texts = run, max_texts
        self._waiting: list[tuple[Encoding, asyncio.Future[dict[str, Any]]]] = []
        self._arrived = asyncio.Event()
        self._thread = ThreadPoolExecutor(1)

    async def ask(self, text: Encoding) -> dict[str, Any]:
        future: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._waiting.append((text, future))
        self._arrived.set()
        return await future

    async def serve(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._arrived.wait()
            self._arrived.clear()
            waiting, self._waiting = self._waiting, []
            waiting.sort(key=lambda item: len(item[0]))
            for start in range(0, len(waiting), self._max_texts):
                batch = waiting[start : start + self._max_texts]
                texts = [text for text, _ in batch]
                answers = await loop.run_in_executor(self._thread, self._run, texts)
                for (_, future), answer in zip(batch, answers, strict=True):
                    if not future.done():
                        future.set_result(answer)


def data_of(answers: Answers) -> dict[str, Any]:
    data = [{"index": index} | answer for index, answer in enumerate(answers)]
    return {"object": "list", "data": data}


def floor(app: FastAPI, given: argparse.Namespace) -> None:
    tokenizer = Tokenizer.from_file(str(given.network / "tokenizer.json"))

    @app.post("/classify")
    async def tokenize(body: Body) -> dict[str, Any]:
        return data_of([{"tokens": len(e)} for e in tokenizer.encode_batch_fast(body.texts)])


def pipeline(app: FastAPI, given: argparse.Namespace) -> None:
    import torch
    from transformers import pipeline

    torch.set_num_threads(given.threads)
    classify = pipeline("text-classification", str(given.network), trust_remote_code=True)

    @app.post("/classify")
    def run_pipeline(body: Body) -> dict[str, Any]:
        return data_of(classify(body.texts, batch_size=given.batch, truncation=True))


def batched(app: FastAPI, given: argparse.Namespace) -> None:
    network = Network(given.network, given.threads, f"{given.runtime}.onnx")
    batcher = Batcher(network.answer, given.batch)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> Any:
        serving = asyncio.create_task(batcher.serve())
        yield
        serving.cancel()

    app.router.lifespan_context = lifespan

    @app.post("/classify")
    async def classify(body: Body) -> dict[str, Any]:
        texts = network.tokenizer.encode_batch_fast(body.texts)
        return data_of(await asyncio.gather(*map(batcher.ask, texts)))


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("runtime", choices=["floor", "pipeline", "plain", "int8"])
    given = parser.parse_args()
    app = FastAPI()

    @app.get("/ready")
    async def ready() -> dict[str, str]:
        return {}

    {"floor": floor, "pipeline": pipeline}.get(given.runtime, batched)(app, given)
    uvicorn.run(app, port=given.port, loop="uvloop", http="httptools", log_level="error")


if __name__ == "__main__":
    main()
