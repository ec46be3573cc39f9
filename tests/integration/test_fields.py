"""Every field of every answer, compared with the readable network and the tokenizer.

Whole answers are compared, so new, missing or wrong fields fail, and so do routes without a test.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import budgetformer
from budgetformer.checkpoint.store import load_tokenizer, read_checkpoint, read_store
from budgetformer.cost.macs import dense_macs
from budgetformer.model.modeling import load_model
from tests.support.counter import step_macs
from tests.support.serving import ADMIN, Service, service
from tests.support.stores import HEADS, LAYERS, TOPICS

pytestmark = pytest.mark.asyncio(loop_scope="session")

TEXT = "The young otter rehearsed beside the organ while nobody looked."
LONG = "thick fog " * 40
STEP = 2


class Like:
    """Equal to any value that matches a pattern or passes a check."""

    def __init__(self, fits: str | Callable[[Any], bool]) -> None:
        self._fits = fits

    def __eq__(self, other: object) -> bool:
        if isinstance(self._fits, str):
            return isinstance(other, str) and re.fullmatch(self._fits, other) is not None
        return self._fits(other)

    def __hash__(self) -> int:
        raise TypeError

    def __repr__(self) -> str:
        return f"Like({self._fits!r})"


def ranked(score: float, rest: str) -> Like:
    """Return what equals a class in the ranking of the Open Inference Protocol: `score:rest`."""
    return Like(
        lambda value: (
            value.endswith(rest)
            and float(value.removesuffix(rest)) == pytest.approx(score, abs=1e-4)
        )
    )


NOW = Like(lambda value: isinstance(value, int) and abs(value - time.time()) < 60)
AGE = Like(lambda value: isinstance(value, float) and 0 <= value < 60)
MESSAGE = Like(r"(?s).{5,300}")
NAME = r"[0-9a-f]{32}"


def near(value: float) -> Any:
    return pytest.approx(value, abs=1e-4)


class Expected:
    """The answers of a checkpoint, computed with the readable network and the tokenizer."""

    def __init__(self, folder: Path) -> None:
        self.checkpoint = read_checkpoint(folder)
        self.manifest = self.checkpoint.manifest
        self._network = load_model(folder).eval()
        self._tokenizer = load_tokenizer(self.checkpoint)
        self.tokens, self.long_tokens = map(self._tokenizer.encode, (TEXT, LONG))
        with torch.no_grad():
            output = self._network(torch.tensor([self.tokens.ids]), steps=STEP)
        self.logits: list[float] = output.logits[0].tolist()
        self.probs: list[float] = output.logits[0].softmax(-1).tolist()
        best = sorted(range(len(self.probs)), key=lambda i: -self.probs[i])
        self.ranked = [
            {"label": self.manifest.labels[i], "score": near(self.probs[i])} for i in best
        ]
        self.rank = best
        count = len(self.tokens)
        self.macs = step_macs(self._network.config, [STEP], count)
        self.dense_macs = dense_macs(self._network.config, count)
        self.used = STEP * LAYERS
        self.usage = {"prompt_tokens": count, "total_tokens": count}
        self.spent = {"heads_used": self.used, "heads_total": LAYERS * HEADS}

    def item(self, **changes: Any) -> dict[str, Any]:
        return {
            "index": 0,
            "label": self.ranked[0]["label"],
            "score": self.ranked[0]["score"],
            "probs": list(map(near, self.probs)),
            "num_classes": len(self.probs),
            "labels": self.ranked,
            "heads": {
                "used": self.used, "total": LAYERS * HEADS, "budget": STEP, "predicted": STEP,
                "steps": [STEP], "per_layer": None,
            },
            "macs": self.macs,
            "dense_macs": self.dense_macs,
            "tokens": len(self.tokens),
            "truncated": False,
            "quality": "auto",
        } | changes  # fmt: skip

    def classified(self, *items: dict[str, Any], **changes: Any) -> dict[str, Any]:
        return {
            "id": Like(f"classify-{NAME}"),
            "object": "list",
            "created": NOW,
            "model": f"{TOPICS}:2",
            "data": list(items),
            "usage": self.usage | self.spent,
        } | changes

    def tensors(self) -> list[dict[str, Any]]:
        best = self.ranked[0]
        classes = len(self.probs)
        return [
            {"name": name, "datatype": kind, "shape": [1, width], "data": data}
            for name, kind, width, data in [
                ("label", "BYTES", 1, [best["label"]]),
                ("score", "FP32", 1, [best["score"]]),
                ("probs", "FP32", classes, list(map(near, self.probs))),
                ("heads", "INT32", 1, [self.used]),
                ("budget", "INT32", 1, [STEP]),
                ("predicted", "INT32", 1, [STEP]),
                ("steps", "BOOL", HEADS + 1, [step == STEP for step in range(HEADS + 1)]),
                ("macs", "INT64", 1, [self.macs]),
            ]
        ]


@pytest.fixture(scope="module")
def expected(model_store: Path) -> Expected:
    return Expected(model_store / TOPICS / "2")


def tokenized(expected: Expected, index: int) -> dict[str, Any]:
    tokens = (expected.tokens, expected.long_tokens)[index]
    return {
        "index": index,
        "tokens": tokens.tokens,
        "ids": tokens.ids,
        "count": len(tokens.ids),
        "truncated": bool(tokens.overflowing),
    }


def infer(text: str, **more: Any) -> dict[str, Any]:
    tensor = {"name": "text", "shape": [1, 1], "datatype": "BYTES", "data": [text]}
    return {"inputs": [tensor], "parameters": {"heads": STEP}, **more}


Body = dict[str, Any]
POST_REQUESTS: dict[str, tuple[str, Body, Callable[[Expected], Any]]] = {
    "classify": ("/classify", {"input": TEXT, "heads": STEP}, lambda e: e.classified(e.item())),
    "classify, all options": (
        "/classify",
        {
            "input": [TEXT], "heads": STEP, "use_activation": False, "top_k": 1,
            "return_heads": True, "quality": "best", "request_id": "mine",
        },
        lambda e: e.classified(
            e.item(
                probs=list(map(near, e.logits)), labels=e.ranked[:1], quality="best",
                heads=e.item()["heads"] | {"per_layer": Like(_has_heads_of_step)},
            ),
            id="classify-mine",
        ),
    ),
    "infinity": (
        "/classify",
        {"input": [TEXT], "heads": STEP, "raw_scores": False},
        lambda e: {
            "id": Like(f"infinity-{NAME}"), "object": "classify", "created": NOW,
            "model": f"{TOPICS}:2", "data": [e.ranked], "usage": e.usage,
        },
    ),
    "tokenize": (
        "/tokenize",
        {"input": [TEXT, LONG]},
        lambda e: {"model": f"{TOPICS}:2", "data": [tokenized(e, 0), tokenized(e, 1)]},
    ),
    "invocations": (
        "/invocations", {"input": TEXT, "heads": STEP}, lambda e: e.classified(e.item())
    ),
    "infer": (
        f"/v2/models/{TOPICS}/infer",
        infer(TEXT, id="mine"),
        lambda e: {
            "id": "mine", "model_name": TOPICS, "model_version": "2", "outputs": e.tensors()
        },
    ),
    "infer, ranked": (
        f"/v2/models/{TOPICS}/versions/2/infer",
        infer(TEXT, outputs=[{"name": "probs", "parameters": {"classification": 2}}]),
        lambda e: {
            "model_name": TOPICS, "model_version": "2",
            "outputs": [{
                "name": "probs", "datatype": "BYTES", "shape": [1, 2],
                "data": [
                    ranked(e.probs[i], f":{i}:{e.manifest.labels[i]}") for i in e.rank[:2]
                ],
            }],
        },
    ),
    "repository index": (
        "/v2/repository/index",
        {"ready": True},
        lambda _: Like(
            lambda rows: {"name": TOPICS, "version": "2", "state": "READY", "reason": ""} in rows
            and all(set(row) == {"name", "version", "state", "reason"} for row in rows)
        ),
    ),
}  # fmt: skip


def _has_heads_of_step(per_layer: Any) -> bool:
    """Say whether each layer names `STEP` of its heads."""
    return len(per_layer) == LAYERS and all(
        len(set(heads)) == STEP and set(heads) <= set(range(HEADS)) for heads in per_layer
    )


@pytest.mark.parametrize("name", POST_REQUESTS)
async def test_answers_to_post(shared: Service, expected: Expected, name: str) -> None:
    path, body, answer = POST_REQUESTS[name]
    response = await shared.client.post(path, json=body)
    assert response.status_code == 200, response.text
    assert response.json() == answer(expected)


@pytest.mark.parametrize("path", ["/predict", "/", "/invocations"])
async def test_answers_in_the_format_of_text_embeddings_inference(
    shared: Service, expected: Expected, path: str
) -> None:
    # This format has no number of heads, so its scores are compared with /classify at a quality.
    item = await shared.item(TEXT, quality="best")
    ranked = item["labels"]
    body = {"inputs": TEXT, "quality": "best"}
    assert (await shared.client.post(path, json=body)).json() == ranked
    (rows,) = (await shared.client.post(path, json={**body, "parameters": {}})).json()
    assert rows == ranked
    assert {row["label"] for row in rows} == set(expected.manifest.labels)


def serving(expected: Expected) -> list[str]:
    store = read_store(expected.checkpoint.path.parent.parent)
    return sorted(store.latest(name).label for name in store.checkpoints)


def card(expected: Expected) -> dict[str, Any]:
    manifest = expected.manifest.model_dump(mode="json")
    config = expected.checkpoint.config
    points = [level.model_dump(mode="json") for level in expected.manifest.levels]
    return {
        "name": TOPICS, "version": 2, "labels": manifest["labels"],
        "problem_type": "single_label_classification", "max_tokens": manifest["max_tokens"],
        "exit_tokens": manifest["exit_tokens"],
        "layers": LAYERS, "heads_per_layer": HEADS, "hidden_size": config["hidden_size"],
        "ladder": config["ladder"], "step_0": True,
        "quality_levels": {
            p["name"]: {k: v for k, v in p.items() if k != "name"} for p in points if p["name"]
        },
        "measure": "accuracy", "chain": None, "exit_margin": None, "entry": None,
        "operating_points": points, "frontier": manifest["frontier"],
        "metrics": manifest["metrics"], "provenance": manifest["provenance"],
        "versions": [1, 2], "ready": True,
    }  # fmt: skip


def shaped(expected: Expected, inputs: str, outputs: str) -> Any:
    """Return the tensors of the Open Inference Protocol, described as one of its routes does."""
    classes = len(expected.probs)
    kinds = {"BYTES": "TYPE_STRING"}
    given = [
        {"name": "text", "datatype": "BYTES", "shape": [-1, 1]},
        {"name": "text_pair", "datatype": "BYTES", "shape": [-1, 1]},
        {"name": "input_ids", "datatype": "INT64", "shape": [-1, -1]},
        {"name": "attention_mask", "datatype": "INT64", "shape": [-1, -1]},
        {"name": "token_type_ids", "datatype": "INT64", "shape": [-1, -1]},
    ]
    answers = [
        {"name": t["name"], "datatype": t["datatype"], "shape": [-1, t["shape"][1]]}
        for t in expected.tensors()
    ]
    if inputs == "inputs":
        return {inputs: given, outputs: answers}
    assert answers[2]["shape"][1] == classes
    return {
        inputs: [
            {"name": t["name"], "dims": t["shape"][1:], "optional": True,
             "data_type": kinds.get(t["datatype"], f"TYPE_{t['datatype']}")}
            for t in given
        ],
        outputs: [
            {"name": t["name"], "dims": t["shape"][1:],
             "data_type": kinds.get(t["datatype"], f"TYPE_{t['datatype']}")}
            for t in answers
        ],
    }  # fmt: skip


def metadata(expected: Expected) -> dict[str, Any]:
    own = {"name": TOPICS, "versions": ["2"], "platform": "budgetformer"}
    return own | shaped(expected, "inputs", "outputs")


def configuration(expected: Expected) -> dict[str, Any]:
    own = {
        "name": TOPICS, "platform": "budgetformer", "backend": "budgetformer",
        "version_policy": {"specific": {"versions": [2]}}, "max_batch_size": 64,
    }  # fmt: skip
    return own | shaped(expected, "input", "output")


def health(expected: Expected) -> dict[str, Any]:
    labels = serving(expected)
    engine = {
        "index": 0, "alive": True, "pid": os.getpid(), "device": Like("cpu.*"),
        "heartbeat_age_seconds": AGE, "in_flight_items": 0, "models": labels,
    }  # fmt: skip
    return {
        "status": "ok", "reason": None, "models": labels, "errors": [], "crash_loops": [],
        "components": {
            "hub": {"status": "ok", "last_word_age_seconds": AGE},
            "supervisor": {
                "status": "ok",
                "tasks": dict.fromkeys(("hub-recent", "hub-beat", "hub-rollouts"), "ok"),
            },
            "engines": {"status": "ok", "alive": 1, "configured": 1},
            "frontends": {"status": "ok", "connected": 1, "configured": 1},
        },
        "engines": [engine],
    }  # fmt: skip


def listed(expected: Expected) -> dict[str, Any]:
    rows = [label.partition(":") for label in serving(expected)]
    return {
        "object": "list",
        "data": [
            {"id": name, "object": "model", "owned_by": "budgetformer", "version": int(version),
             "default": name == TOPICS, "candidate": None}
            for name, _, version in rows
        ],
    }  # fmt: skip


GET_ANSWERS: dict[str, Callable[[Expected], Any]] = {
    "/health": health,
    "/health/live": lambda _: {"status": "ok"},
    "/health/ready": lambda _: {"status": "ok"},
    "/ping": lambda _: {"status": "ok"},
    "/v1/models": listed,
    f"/models/{TOPICS}": card,
    "/v2": lambda _: {
        "name": "budgetformer-serving", "version": budgetformer.__version__,
        "extensions": [
            "binary_tensor_data", "classification", "model_configuration", "model_repository"
        ],
    },
    "/v2/health/live": lambda _: {"live": True},
    "/v2/health/ready": lambda _: {"ready": True},
    f"/v2/models/{TOPICS}": metadata,
    f"/v2/models/{TOPICS}/versions/2": metadata,
    f"/v2/models/{TOPICS}/config": configuration,
    f"/v2/models/{TOPICS}/versions/2/config": configuration,
    f"/v2/models/{TOPICS}/ready": lambda _: {"name": TOPICS, "ready": True},
    f"/v2/models/{TOPICS}/versions/2/ready": lambda _: {"name": TOPICS, "ready": True},
}  # fmt: skip


@pytest.mark.parametrize("path", GET_ANSWERS)
async def test_answers_to_get(shared: Service, expected: Expected, path: str) -> None:
    response = await shared.client.get(path)
    assert response.status_code == 200, response.text
    assert response.json() == GET_ANSWERS[path](expected)


CHANGES: dict[str, Any] = {
    "/models/none/load": None,
    "/models/none/unload": None,
    "/v2/repository/models/none/load": None,
    "/v2/repository/models/none/unload": None,
}


async def test_answers_to_loading_and_unloading(model_store: Path) -> None:
    async with service(model_store, models=[TOPICS]) as running:
        for path, answer in (
            (f"/models/{TOPICS}/unload", {"model": f"{TOPICS}:2", "status": "unloaded"}),
            (f"/models/{TOPICS}/load", {"model": f"{TOPICS}:2", "status": "loaded"}),
            (f"/v2/repository/models/{TOPICS}/unload", {}),
            (f"/v2/repository/models/{TOPICS}/load", {}),
        ):
            response = await running.client.post(path, headers=ADMIN)
            assert response.json() == answer


TESTED_ELSEWHERE = {"/", "/metrics", "/predict", "/settings/reload"}
TESTED_ELSEWHERE |= {f"/models/{TOPICS}/{end}" for end in ("rollout", "promote", "rollback")}
TESTED_ELSEWHERE |= {"/jobs", "/jobs/one", "/jobs/one/result"}
"""Routes whose answers are not JSON or are compared in another test."""


async def test_every_route_is_compared(shared: Service) -> None:
    seen = (
        {path for path, _, _ in POST_REQUESTS.values()}
        | {*GET_ANSWERS, *CHANGES}
        | TESTED_ELSEWHERE
    )
    documented = shared.app.openapi()["paths"]
    patterns = {path: re.sub(r"\{\w+\}", "[^/]+", path) for path in documented}
    missing = [
        p for p, pattern in patterns.items() if not any(re.fullmatch(pattern, s) for s in seen)
    ]
    assert missing == []


ERRORS: dict[str, Callable[..., Any]] = {
    "/classify": lambda kind, code, param, _: {
        "error": {"message": MESSAGE, "type": kind, "param": param, "code": code}
    },
    "/predict": lambda _, __, ___, tei_type: {"error": MESSAGE, "error_type": tei_type},
    f"/v2/models/{TOPICS}/infer": lambda *_: {"error": MESSAGE},
}


@pytest.mark.parametrize("path", ERRORS)
async def test_the_fields_of_errors(shared: Service, path: str) -> None:
    shape = ERRORS[path]
    malformed = await shared.client.post(path, content=b"{")
    assert malformed.json() == shape("invalid_request", "invalid_json", None, "validation")
    unknown = await shared.client.post(path, json={"xyzzy": 1})
    wanted = shape("invalid_field", "unknown_field", "xyzzy", "validation")
    missing = shape("invalid_field", "missing_field", "input", "validation")
    assert unknown.json() in (wanted, missing)
    large = await shared.client.post(path, content=b" " * 500_001)
    assert large.json() == shape("too_large", "body_too_large", None, "validation")


async def test_the_headers_of_an_answer(shared: Service) -> None:
    response = await shared.ask(TEXT, quality="fast")
    stages = dict(part.split(";dur=") for part in response.headers["server-timing"].split(", "))
    assert list(stages) == ["tokenize", "budget", "queue", "compute", "total"]
    times = {name: float(value) for name, value in stages.items()}
    assert all(value >= 0 for value in times.values())
    assert times["total"] >= times["tokenize"]
    assert response.headers["x-quality"] == "fast"
    assert set(response.headers) == {
        "content-length", "content-type", "server-timing", "x-quality", "x-request-id",
        "x-content-type-options", "referrer-policy", "x-frame-options",
    }  # fmt: skip
    assert Like(NAME) == response.headers["x-request-id"]
    assert response.json()["id"] == f"classify-{response.headers['x-request-id']}"
