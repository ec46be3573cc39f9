"""Measure the compression of answers: size and processor time by compression level.

    python loadtests/compression.py --model banking77 --data banking77/test.parquet --texts 64

Fetches answers in each format from a running server, and compresses them here with the server's
parameters.
"""

from __future__ import annotations

import argparse
import statistics
import time
import zlib
from pathlib import Path
from typing import Any

import httpx

from loadtests.texts import texts_of
from service.http.accept import ARROW
from service.http.compression import GZIP_FORMAT

LEVELS = (1, 4, 6)
REPEATS = 51


def answers(url: str, model: str, texts: list[str]) -> dict[str, bytes]:
    """Return the bodies of answers to the same texts, by format."""
    tensor = {"name": "text", "datatype": "BYTES", "shape": [len(texts)], "data": texts}
    tensors = {"inputs": [tensor], "parameters": {"binary_data_output": True}}
    requests: dict[str, tuple[str, Any, dict[str, str]]] = {
        "JSON": ("/classify", {"input": texts, "model": model}, {}),
        "Arrow": ("/classify", {"input": texts, "model": model}, {"Accept": ARROW}),
        "KServe, binary": (f"/v2/models/{model}/infer", tensors, {}),
    }
    with httpx.Client(base_url=url, headers={"Accept-Encoding": "identity"}, timeout=60) as client:
        bodies = {
            name: client.post(path, json=body, headers=headers).raise_for_status().content
            for name, (path, body, headers) in requests.items()
        }
        return bodies | {"/metrics": client.get("/metrics").raise_for_status().content}


def measure(body: bytes, level: int) -> tuple[int, float]:
    """Return the compressed size of a body, and the median processor time in microseconds."""
    took = []
    for _ in range(REPEATS):
        started = time.process_time()
        compressed = zlib.compress(body, level, GZIP_FORMAT)
        took.append(time.process_time() - started)
    return len(compressed), statistics.median(took) * 1e6


def main() -> None:
    """Measure, and print a line per format and level."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--model", default="banking77")
    parser.add_argument("--data", type=Path, help="Parquet file with a column `text`")
    parser.add_argument("--texts", type=int, default=64)
    given = parser.parse_args()
    texts = texts_of(given.data, given.texts)
    for name, body in answers(given.url, given.model, texts).items():
        for level in LEVELS:
            size, microseconds = measure(body, level)
            print(f"{name:15} {len(body):8} level {level}: {size:7} bytes, {microseconds:6.0f} us")


if __name__ == "__main__":
    main()
