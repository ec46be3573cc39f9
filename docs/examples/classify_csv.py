"""Classify a CSV with the library: `python classify_csv.py texts.csv answers.csv [MODEL_FOLDER]`.

Keeps all columns and adds `label`, `score` and `heads`. (`budgetformer classify` does the same on
all cores, also for files that do not fit into memory.)
"""

from __future__ import annotations

import csv
import sys

from budgetformer import Classifier


def main(source: str, target: str, model: str = "model_store/ag_news") -> None:
    classify = Classifier(model)
    with open(source, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    answers = classify([row["text"] for row in rows], quality="balanced")
    for row, answer in zip(rows, answers, strict=True):
        row |= {"label": answer.label, "score": f"{answer.score:.4f}", "heads": answer.heads}
    with open(target, "w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, rows[0] if rows else ["text"])
        table.writeheader()
        table.writerows(rows)
    spent = sum(answer.macs for answer in answers) / max(1, sum(a.dense_macs for a in answers))
    print(f"{len(rows)} rows, {spent:.1%} of the dense network's multiply-adds")


if __name__ == "__main__":
    main(*sys.argv[1:])
