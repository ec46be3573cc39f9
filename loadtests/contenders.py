"""Who takes part in a comparison: how each is started, asked and read."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from servers import Server

CODE = Path("loadtests/baselines")
ENVIRONMENTS = Path("build/baselines")
BATCH = 8

OURS: dict[str, dict[str, Any]] = {
    "fast": {"quality": "fast"},
    "balanced": {"quality": "balanced"},
    "best": {"quality": "best"},
    "full budget": {"heads": 12},
}
"""Fields of a request, by the name in the report."""


def first(answer: Any) -> dict[str, Any]:
    """Return what an answer in our own form says of its first text."""
    return dict(answer["data"][0])


@dataclass(frozen=True)
class Contender:
    """A server of the dense network.

    Attributes:
        name: in the report.
        program: words after the interpreter of its environment; a first word without an ending is
            a command there. `{port}`, `{network}` (a folder), `{threads}`, `{batch}` are filled in.
        ready: path that answers 200 when it serves.
        environment: folder below build/baselines; None: this program's own.
        variables: of its environment, filled in likewise.
        body: what to send for a text.
        read: what came back for it, with a `label`.
    """

    name: str
    program: Sequence[str]
    ready: str = "/ready"
    environment: str | None = None
    variables: Mapping[str, str] = field(default_factory=dict)
    body: Callable[[str], dict[str, Any]] = lambda text: {"input": text}
    read: Callable[[Any], dict[str, Any]] = first

    @property
    def interpreter(self) -> Path:
        """The Python that runs it."""
        if self.environment is None:
            return Path(sys.executable)
        return ENVIRONMENTS / self.environment / "bin" / "python"

    @property
    def missing(self) -> str | None:
        """Why it cannot take part here; None: it can."""
        if self.interpreter.exists():
            return None
        return f"`make baselines` has not made {self.interpreter.parents[1]}"

    def server(self, network: Path, cores: Sequence[int]) -> Server:
        """Return it, not started yet, with one thread per core."""
        filled = {
            "{network}": str(network.absolute()), "{threads}": str(len(cores)),
            "{batch}": str(BATCH),
        }  # fmt: skip

        def fill(word: str) -> str:
            for mark, value in filled.items():
                word = word.replace(mark, value)
            return word

        command, *words = map(fill, self.program)
        if command.endswith(".py"):
            start = [str(self.interpreter.absolute()), str(CODE / command)]
        else:
            start = [str(self.interpreter.absolute().with_name(command))]
        quiet = {
            "OMP_NUM_THREADS": str(len(cores)), "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_VERBOSITY": "critical", "PYTHONWARNINGS": "ignore",
            "TQDM_DISABLE": "1",
        }  # fmt: skip
        variables = quiet | {name: fill(value) for name, value in self.variables.items()}
        return Server([*start, *words], cores, self.ready, variables)


def _fastapi(name: str, runtime: str) -> Contender:
    return Contender(name, ["serve.py", runtime, *_GIVEN])


_GIVEN = ["--port={port}", "--network={network}", "--threads={threads}", "--batch={batch}"]

ONNX_INT8 = _fastapi("ONNX Runtime int8, dynamic batching", "int8")
ONNX_FLOAT32 = _fastapi("ONNX Runtime float32, dynamic batching", "plain")
PIPELINE = _fastapi("FastAPI + pipeline", "pipeline")
FLOOR = _fastapi("floor: only parses and tokenizes", "floor")
LITSERVE = Contender(
    "LitServe, ONNX Runtime int8", ["litserve_app.py", *_GIVEN], "/health", "litserve",
    read=lambda answer: dict(answer),
)  # fmt: skip
BENTOML = Contender(
    "BentoML, ONNX Runtime int8",
    [
        "bentoml", "serve", "bentoml_app:Classifier", f"--working-dir={CODE}",
        "--host=127.0.0.1", "--port={port}",
    ],
    "/readyz", "bentoml",
    {
        "NETWORK": "{network}", "THREADS": "{threads}", "BATCH": "{batch}",
        "BENTOML_DO_NOT_TRACK": "True",
    },
    lambda text: {"texts": [text]}, lambda answer: dict(answer[0]),
)  # fmt: skip
INFINITY = Contender(
    "Infinity, torch float32",
    [
        "infinity_emb", "v2", "--model-id={network}", "--served-model-name=twin",
        "--engine=torch", "--device=cpu", "--dtype=float32", "--batch-size={batch}",
        "--no-bettertransformer", "--no-model-warmup",
        "--host=127.0.0.1", "--port={port}", "--log-level=error",
    ],
    "/health", "infinity", {"DO_NOT_TRACK": "1", "INFINITY_ANONYMOUS_USAGE_STATS": "0"},
    lambda text: {"model": "twin", "input": [text]}, lambda answer: dict(answer["data"][0][0]),
)  # fmt: skip
RAY = Contender(
    "Ray Serve, ONNX Runtime int8", ["ray_app.py", *_GIVEN], "/classify", "ray",
    read=lambda answer: dict(answer),
)  # fmt: skip

CONTENDERS = (ONNX_INT8, ONNX_FLOAT32, PIPELINE, LITSERVE, BENTOML, INFINITY, RAY, FLOOR)
DENSE = tuple(baseline.name for baseline in CONTENDERS if baseline is not FLOOR)
