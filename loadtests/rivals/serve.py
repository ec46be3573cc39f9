"""What a user would serve instead: the dense twin of a checkpoint behind FastAPI.

    python loadtests/rivals/serve.py onnx-int8 --port 8001 --checkpoint model_store/ag_news/2

The twin is the checkpoint's full step as a BERT of Transformers with the same weights, so it
answers what this service answers at full budget. `pipeline` runs it in Transformers' own pipeline,
one call a request, as its documentation shows; `onnx-float32` and `onnx-int8` in ONNX Runtime
behind dynamic batching; `floor` only parses and tokenizes. Batches form as in this service, of what
came while the last ones ran; they hold texts of similar length, so that little is padded.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel
from transformers import BertConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.pipelines import TextClassificationPipeline

from budgetformer.bench.rivals import NAMES, DenseTwin, export_onnx, padded
from budgetformer.checkpoint import Checkpoint, load_tokenizer, read_checkpoint
from budgetformer.modeling import load_model

Scores = list[list[float]]


class Body(BaseModel):
    input: str | list[str]


class Batcher:
    """Run what waits, in batches of texts of similar length.

    Args:
        run: classifies token ids [B, *] into logits [B, C], in a thread.
        most: texts in a batch.
    """

    def __init__(self, run: Callable[[Sequence[list[int]]], np.ndarray], most: int) -> None:
        self._run, self._most = run, most
        self._waiting: list[tuple[list[int], asyncio.Future[np.ndarray]]] = []
        self._came = asyncio.Event()
        self._thread = ThreadPoolExecutor(1)

    async def ask(self, ids: list[int]) -> np.ndarray:
        future: asyncio.Future[np.ndarray] = asyncio.get_running_loop().create_future()
        self._waiting.append((ids, future))
        self._came.set()
        return await future

    async def serve(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._came.wait()
            self._came.clear()
            taken, self._waiting = self._waiting, []
            taken.sort(key=lambda one: len(one[0]))
            for start in range(0, len(taken), self._most):
                batch = taken[start : start + self._most]
                logits = await loop.run_in_executor(self._thread, self._run, [i for i, _ in batch])
                for (_, future), row in zip(batch, logits, strict=True):
                    if not future.done():
                        future.set_result(row)


def onnx_run(path: Path, threads: int) -> Callable[[Sequence[list[int]]], np.ndarray]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def run(items: Sequence[list[int]]) -> np.ndarray:
        return np.asarray(session.run(None, dict(zip(NAMES, padded(items), strict=True)))[0])

    return run


class TwinForPipeline(PreTrainedModel):  # type: ignore[misc]
    """The twin as the pipeline wants it."""

    config_class = BertConfig
    main_input_name = "input_ids"

    def __init__(self, config: BertConfig, twin: DenseTwin) -> None:
        super().__init__(config)
        self.twin = twin

    def forward(self, input_ids: Any, attention_mask: Any, **_: Any) -> SequenceClassifierOutput:
        segments = torch.zeros_like(input_ids)
        return SequenceClassifierOutput(logits=self.twin(input_ids, attention_mask, segments))


def transformers_pipeline(checkpoint: Checkpoint, twin: DenseTwin) -> Callable[[list[str]], Any]:
    labels = dict(enumerate(checkpoint.manifest.labels))
    config = BertConfig(id2label=labels, label2id={v: k for k, v in labels.items()})
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(checkpoint.path / "tokenizer.json"), pad_token="[PAD]",
        model_max_length=checkpoint.manifest.max_tokens,
        model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip
    model = TwinForPipeline(config, twin).eval()
    made = TextClassificationPipeline(model=model, tokenizer=tokenizer, device="cpu")
    return lambda texts: made(texts, batch_size=8, truncation=True, top_k=None)


def data_of(labels: Sequence[str], scores: Scores) -> dict[str, Any]:
    rows = []
    for index, row in enumerate(scores):
        best = max(range(len(row)), key=row.__getitem__)
        rows.append({"index": index, "label": labels[best], "score": row[best], "probs": row})
    return {"object": "list", "data": rows}


def application(given: argparse.Namespace) -> FastAPI:
    checkpoint = read_checkpoint(given.checkpoint)
    labels, tokenizer = checkpoint.manifest.labels, load_tokenizer(checkpoint)

    def encode(body: Body) -> list[list[int]]:
        texts = [body.input] if isinstance(body.input, str) else body.input
        return [encoding.ids for encoding in tokenizer.encode_batch_fast(texts)]

    app = FastAPI()

    @app.get("/ready")
    async def ready() -> dict[str, str]:
        return {}

    if given.runtime == "floor":

        @app.post("/classify")
        async def floor(body: Body) -> dict[str, Any]:
            return {"object": "list", "data": [{"tokens": len(ids)} for ids in encode(body)]}

        return app
    twin = DenseTwin(load_model(checkpoint.path)).eval()
    if given.runtime == "pipeline":
        classify = transformers_pipeline(checkpoint, twin)

        @app.post("/classify")
        def piped(body: Body) -> dict[str, Any]:
            texts = [body.input] if isinstance(body.input, str) else body.input
            found = [{one["label"]: one["score"] for one in row} for row in classify(texts)]
            return data_of(labels, [[row[label] for label in labels] for row in found])

        return app
    given.folder.mkdir(parents=True, exist_ok=True)
    plain, small = given.folder / "plain.onnx", given.folder / "int8.onnx"
    if not small.exists():
        export_onnx(twin, given.folder)
    run = onnx_run(plain if given.runtime == "onnx-float32" else small, given.threads)
    run([[1, 2, 3]] * 2)
    batcher = Batcher(run, given.batch)

    @asynccontextmanager
    async def life(_: FastAPI) -> Any:
        serving = asyncio.create_task(batcher.serve())
        yield
        serving.cancel()

    app.router.lifespan_context = life

    @app.post("/classify")
    async def batched(body: Body) -> dict[str, Any]:
        logits = np.stack(await asyncio.gather(*map(batcher.ask, encode(body))))
        powers = np.exp(logits - logits.max(1, keepdims=True))
        return data_of(labels, (powers / powers.sum(1, keepdims=True)).tolist())

    return app


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runtime", choices=["floor", "pipeline", "onnx-float32", "onnx-int8"])
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--checkpoint", type=Path, default=Path("model_store/ag_news/2"))
    parser.add_argument("--folder", type=Path, default=Path("build/rivals"), help="of exports")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=8)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    with torch.inference_mode():
        app = application(given)
    uvicorn.run(app, port=given.port, loop="uvloop", http="httptools", log_level="error")


if __name__ == "__main__":
    main()
