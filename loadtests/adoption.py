"""Compare ways to serve a third-party classifier: time to the first answer, and throughput.

`python -m loadtests.adoption my_classifier/ --texts log.jsonl --budgets model_store/mine/2`
compares Transformers' pipeline and ONNX Runtime int8 with this project, which serves the classifier
unchanged (in float32, and in the precision that a server chooses here: bfloat16 with AMX, otherwise
int8) and with budgets. All answer the same texts in batches of 32, in turns, with the same number
of threads. Agreement is with the pipeline's labels.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import httpx
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

from budgetformer.adoption.adding import add_classifier
from budgetformer.bench.dense_twin import export_onnx, onnx_session
from budgetformer.classifier import Classifier
from budgetformer.cost.processor import processor_name
from budgetformer.training.data import read_texts
from budgetformer.training.pages import markdown_table
from budgetformer.wilson import interval
from loadtests.servers import Server

BATCH, ROUNDS = 32, 3
LOAD = """
import sys
from transformers import pipeline
print(pipeline("text-classification", model=sys.argv[1], device="cpu")(sys.argv[2]))
"""

Answer = Callable[[list[str]], list[str]]
"""A function that returns the label of each text."""


def seconds_to_serve(folder: Path, store: Path, text: str) -> float:
    """Return the seconds from `serve --model` to the first answer."""
    command = [sys.executable, "-m", "budgetformer", "serve", "--port={port}"]
    command += [f"--model={folder}", f"--model-store={store}"]
    began = time.perf_counter()
    with Server(command, sorted(os.sched_getaffinity(0))) as server:
        httpx.post(f"{server.url}/classify", json={"input": text}, timeout=10).raise_for_status()
        return time.perf_counter() - began


def seconds_of_pipeline(folder: Path, text: str) -> float:
    """Return the seconds of a program that loads the pipeline and answers one text."""
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", LOAD, folder, text], check=True, capture_output=True)
    return time.perf_counter() - began


def of_pipeline(folder: Path, max_tokens: int) -> Answer:
    """Return a function that classifies with Transformers' pipeline."""
    classify = pipeline("text-classification", model=str(folder), device="cpu", dtype=torch.float32)

    def answer(texts: list[str]) -> list[str]:
        results: Any = classify(texts, batch_size=BATCH, truncation=True, max_length=max_tokens)
        return [result["label"] for result in results]

    return answer


def of_onnx(folder: Path, scratch: Path, max_tokens: int, threads: int) -> Answer:
    """Return a function that classifies in ONNX Runtime, with the weights in int8."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    names = [str(model.config.id2label[i]) for i in range(model.config.num_labels)]
    inputs = list(tokenizer(["a", "b"], return_tensors="pt"))
    _, int8 = export_onnx(model, scratch, inputs)
    session = onnx_session(int8, threads)

    def answer(texts: list[str]) -> list[str]:
        labels: list[str] = []
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        for start in range(0, len(texts), BATCH):
            batch = [texts[i] for i in order[start : start + BATCH]]
            tokens = tokenizer(
                batch, padding=True, truncation=True, max_length=max_tokens, return_tensors="np"
            )
            (logits,) = session.run(None, {name: tokens[name] for name in inputs})
            labels += [names[i] for i in logits.argmax(-1)]
        by_index = dict(zip(order, labels, strict=True))
        return [by_index[i] for i in range(len(texts))]

    return answer


def of_checkpoint(path: Path, quality: str | None, precision: Any = "auto") -> Answer:
    """Return a function that classifies with a checkpoint of this project.

    `quality` None computes all heads.
    """
    classifier = Classifier(path, precision=precision)
    heads = classifier.checkpoint.num_heads if quality is None else None

    def answer(texts: list[str]) -> list[str]:
        return [result.label for result in classifier(texts, quality=quality, heads=heads)]

    return answer


def measure(
    classifiers: dict[str, Answer], texts: list[str]
) -> dict[str, tuple[list[str], list[float]]]:
    """Run all classifiers in turns; return the labels and the texts per second of each round."""
    rates: dict[str, list[float]] = {name: [] for name in classifiers}
    labels: dict[str, list[str]] = {}
    for turn in range(ROUNDS + 1):
        for name, answer in classifiers.items():
            began = time.perf_counter()
            labels[name] = answer(texts)
            if turn:
                rates[name].append(len(texts) / (time.perf_counter() - began))
    return {name: (labels[name], rates[name]) for name in classifiers}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and print the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--texts", type=Path, required=True)
    parser.add_argument("--budgets", type=Path, action="append", default=[])
    parser.add_argument("--limit", type=int, default=1000)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    texts = read_texts(given.texts).evenly(given.limit).texts
    with tempfile.TemporaryDirectory() as scratch:
        store = Path(scratch) / "store"
        first, second = (seconds_to_serve(given.folder, store, texts[0]) for _ in range(2))
        pipeline_seconds = seconds_of_pipeline(given.folder, texts[0])
        plain = add_classifier(given.folder, store, lambda _: None)
        calibrated = add_classifier(given.folder, store, lambda _: None, texts=given.texts)
        max_tokens = plain.manifest.max_tokens
        as_served = Classifier(calibrated.path).network.precision
        classifiers = {
            "Transformers' pipeline, float32": of_pipeline(given.folder, max_tokens),
            "ONNX Runtime, int8": of_onnx(given.folder, Path(scratch), max_tokens, given.threads),
            "unchanged, float32": of_checkpoint(plain.path, None, "float32"),
            f"unchanged, {as_served}": of_checkpoint(calibrated.path, None),
        }
        for path in given.budgets:
            for level in ("best", "balanced", "fast"):
                classifiers[f"{path}, {level}"] = of_checkpoint(path, level)
        results = measure(classifiers, texts)
    reference, base = results["Transformers' pipeline, float32"]
    rows = []
    for name, (labels, rates) in results.items():
        same = sum(a == b for a, b in zip(labels, reference, strict=True)) / len(texts)
        low, high = interval(same, len(texts))
        rate = statistics.median(rates)
        rows.append(
            [
                name,
                f"{rate:,.0f} ({min(rates):,.0f} to {max(rates):,.0f})",
                f"{rate / statistics.median(base):.2f}",
                f"{same:.4f} ({low:.4f} to {high:.4f})",
            ]
        )
    where = f"{processor_name()}, {given.threads} threads"
    print(f"{where}; {len(texts)} texts of {given.texts.name}")
    print(
        f"From the command to the first answer: `serve --model` {first:.1f} s, again "
        f"{second:.1f} s; a program with the pipeline {pipeline_seconds:.1f} s.\n"
    )
    columns = [
        "classifier", "texts/s: median (range)", "of the pipeline's", "agreement with the pipeline",
    ]  # fmt: skip
    print(markdown_table(columns, rows))


if __name__ == "__main__":
    main()
