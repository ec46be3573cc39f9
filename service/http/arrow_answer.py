"""The response to POST /classify as columns, in an Arrow stream.

Shapes: B texts, C labels.
"""

from __future__ import annotations

import asyncio
from functools import cache
from typing import Any

import numpy as np
from fastapi import Request, Response

from budgetformer.model.tfidf import Array
from service.http.accept import ARROW
from service.http.answers import Answered, best_first
from service.http.errors import ApiError
from service.http.schemas import ClassifyRequest
from service.ipc.answers import UNPREDICTED


@cache
def pyarrow() -> Any:
    """Import pyarrow.

    Raises:
        ImportError: pyarrow is not installed.
    """
    import pyarrow

    return pyarrow


async def prepare(body: ClassifyRequest) -> None:
    """Check that a request can be answered with columns, and import pyarrow.

    The import runs in a thread, so that other requests do not wait.

    Raises:
        ApiError: 422, a field needs JSON; 406, pyarrow is not installed.
    """
    for name, needs_json in (
        ("raw_scores", body.raw_scores is not None),
        ("return_heads", body.return_heads),
    ):
        if needs_json:
            message = f"an Arrow stream has no place for what {name} asks for; accept JSON"
            raise ApiError(422, message, name, "invalid_field")
    if pyarrow.cache_info().currsize:
        return
    try:
        await asyncio.to_thread(pyarrow)
    except ImportError:
        message = "Arrow needs pyarrow on the server (pip install 'budgetformer-serving[arrow]')"
        raise ApiError(406, message, "Accept") from None


def arrow_response(request: Request, answered: Answered) -> Response:
    """Return the response to POST /classify as one record batch; a failed item is a row of nulls.

    Raises:
        ApiError: 500, every item failed.
    """
    answered.report_failures(request.scope)
    pa = pyarrow()
    batch = pa.RecordBatch.from_pydict(
        _columns(pa, answered),
        metadata={
            "model": answered.checkpoint.label,
            "quality": str(answered.quality),
            "id": answered.id,
        },
    )
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return Response(sink.getvalue().to_pybytes(), media_type=ARROW)


def _columns(pa: Any, answered: Answered) -> dict[str, Any]:
    answers, body, scores = answered.answers, answered.body, answered.scores
    count, classes = scores.shape
    names = answered.checkpoint.manifest.labels
    errors: Any = pa.nulls(count, pa.string())
    failed = lists_failed = None
    if answers.errors:
        failures = map(answered.failure, range(count))
        errors = pa.array([one and one.message for one in failures], pa.string())
        failed = answers.failed
        lists_failed = pa.array(failed)

    def column(values: Array, mask: Array | None = failed) -> Any:
        return pa.array(values, mask=mask)

    def floats(values: Array) -> Any:
        return pa.array(values.astype(np.float32).ravel())

    unknown = answers.predicted == UNPREDICTED
    steps, offsets = answers.step_columns()
    best = scores.argmax(-1).astype(np.int32)
    probs = answers.logits if body.use_activation is False else scores
    columns = {
        "index": pa.array(np.arange(count, dtype=np.int32)),
        "label": pa.DictionaryArray.from_arrays(best, pa.array(names, pa.string()), mask=failed),
        "score": column(scores.max(-1).astype(np.float32)),
        "probs": pa.FixedSizeListArray.from_arrays(floats(probs), classes, mask=lists_failed),
        "budget": column(answers.step),
        "predicted": column(answers.predicted, unknown if failed is None else unknown | failed),
        "steps": pa.ListArray.from_arrays(
            offsets.astype(np.int32), steps.astype(np.int32), mask=lists_failed
        ),
        "heads": column(answers.heads),
        "macs": column(answers.macs),
        "dense_macs": column(answers.dense_macs),
        "tokens": column(answered.lengths),
        "truncated": column(answered.truncated),
    }
    if body.top_k is not None or body.threshold is not None:
        order = best_first(scores)[:, : body.top_k]
        ranked = np.take_along_axis(scores, order, -1)
        kept = ranked >= (body.threshold or 0.0)
        labels = pa.array([names[i] for i in order[kept].tolist()], pa.string())
        entries = pa.StructArray.from_arrays([labels, floats(ranked[kept])], ["label", "score"])
        ends = np.concatenate([[0], np.cumsum(kept.sum(-1))]).astype(np.int32)
        columns["labels"] = pa.ListArray.from_arrays(ends, entries, mask=lists_failed)
    return columns | {"error": errors}
