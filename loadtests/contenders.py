"""The servers of a comparison: how to start each, send it texts and read its answers."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loadtests.servers import Server

CODE = Path("loadtests/baselines")
ENVIRONMENTS = Path("build/baselines")
BATCH = 8

OURS: dict[str, dict[str, Any]] = {
    "fast": {"quality": "fast"},
    "balanced": {"quality": "balanced"},
    "best": {"quality": "best"},
    "full budget": {"heads": 12},
}
"""Request fields of this service, by the name in the report."""


def first(answer: Any) -> dict[str, Any]:
    """Return the result of the first text from an answer in this service's format."""
    return dict(answer["data"][0])


@dataclass(frozen=True)
class Contender:
    """A server of the dense network.

    Attributes:
        name: name in the report.
        program: command line: a script of loadtests/baselines (`*.py`) or a command of the virtual
            environment, and its arguments. `{port}`, `{network}` (a folder), `{threads}` and
            `{batch}` are replaced.
        ready: path that answers 200 once the server is ready.
        environment: virtual environment, a folder in build/baselines; None: that of this program.
        variables: environment variables, with the same replacements.
        body: returns the request body for a text.
        read: returns the result of that text, with a `label`, from the answer.
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
        """Path of the Python interpreter that runs the server."""
        if self.environment is None:
            return Path(sys.executable)
        return ENVIRONMENTS / self.environment / "bin" / "python"

    @property
    def missing(self) -> str | None:
        """Reason why the server cannot be measured on this machine; None: it can."""
        if self.interpreter.exists():
            return None
        return f"{self.interpreter.parents[1]} does not exist; run `make baselines`"

    def server(self, network: Path, cores: Sequence[int]) -> Server:
        """Return the server, which is not started yet, with one thread per core."""
        values = {
            "{network}": str(network.absolute()), "{threads}": str(len(cores)),
            "{batch}": str(BATCH),
        }  # fmt: skip

        def fill(word: str) -> str:
            for placeholder, value in values.items():
                word = word.replace(placeholder, value)
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
    return Contender(name, ["serve.py", runtime, *_OPTIONS])


_OPTIONS = ["--port={port}", "--network={network}", "--threads={threads}", "--batch={batch}"]

ONNX_INT8 = _fastapi("ONNX Runtime int8, dynamic batching", "int8")
ONNX_FLOAT32 = _fastapi("ONNX Runtime float32, dynamic batching", "plain")
PIPELINE = _fastapi("FastAPI + pipeline", "pipeline")
FLOOR = _fastapi("floor: only parses and tokenizes", "floor")
LITSERVE = Contender(
    "LitServe, ONNX Runtime int8", ["litserve_app.py", *_OPTIONS], "/health", "litserve",
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
    "Ray Serve, ONNX Runtime int8", ["ray_app.py", *_OPTIONS], "/classify", "ray",
    read=lambda answer: dict(answer),
)  # fmt: skip

CONTENDERS = (ONNX_INT8, ONNX_FLOAT32, PIPELINE, LITSERVE, BENTOML, INFINITY, RAY, FLOOR)
DENSE = tuple(baseline.name for baseline in CONTENDERS if baseline is not FLOOR)
