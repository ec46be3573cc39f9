"""Classify texts with an exported network in ONNX Runtime, without torch or `budgetformer`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from tokenizers import Encoding, Tokenizer


def arguments(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the options that all these servers have."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--network", type=Path, required=True, help="folder that export.py wrote")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=8)
    return parser


class Network:
    """An exported network and its tokenizer.

    Args:
        folder: output of export.py.
        threads: number of threads of ONNX Runtime.
        file: name of the network's file in the folder.
    """

    def __init__(self, folder: Path, threads: int, file: str = "int8.onnx") -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        providers = ["CPUExecutionProvider"]
        self._session = onnxruntime.InferenceSession(folder / file, options, providers=providers)
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.no_padding()
        labels = json.loads((folder / "config.json").read_text())["id2label"]
        self.labels = [labels[str(number)] for number in range(len(labels))]
        self(["warm", "up"])

    def __call__(self, texts: Sequence[str]) -> list[dict[str, Any]]:
        """Return the label, its score and all probabilities of every text."""
        return self.answer(self.tokenizer.encode_batch_fast(list(texts)))

    def answer(self, batch: Sequence[Encoding]) -> list[dict[str, Any]]:
        """Answer tokenized texts, padded to the longest one."""
        ids = np.zeros((len(batch), max(map(len, batch))), np.int64)
        mask = np.zeros_like(ids)
        for row, encoding in enumerate(batch):
            ids[row, : len(encoding)] = encoding.ids
            mask[row, : len(encoding)] = 1
        given = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
        (logits,) = self._session.run(None, given)
        powers = np.exp(logits - logits.max(1, keepdims=True))
        scores = powers / powers.sum(1, keepdims=True)
        return [
            {"label": self.labels[row.argmax()], "score": float(row.max()), "probs": row.tolist()}
            for row in scores
        ]
