"""Performance targets, and whether they are met."""

from __future__ import annotations

import operator
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

SIGNS = {">=": operator.ge, "<=": operator.le}


@dataclass(frozen=True)
class Promise:
    """A performance target.

    Attributes:
        what: description of the figure.
        sign: `>=` or `<=`.
        bound: the target value.
        reached: measured values, one per repeat.
        needs_real_texts: whether the figure depends on how difficult the texts are.
    """

    what: str
    sign: str
    bound: float
    reached: Sequence[float]
    needs_real_texts: bool = False

    @property
    def verdict(self) -> str:
        """`pass` or `short`, by the median of the repeats."""
        return "pass" if SIGNS[self.sign](statistics.median(self.reached), self.bound) else "short"

    @property
    def row(self) -> list[str]:
        return [self.what, f"{self.sign} {self.bound:g}", spread(self.reached), self.verdict]

    def as_dict(self) -> dict[str, Any]:
        return {
            "what": self.what, "reach": f"{self.sign} {self.bound:g}",
            "reached": list(self.reached), "verdict": self.verdict,
        }  # fmt: skip


def spread(values: Sequence[float], form: str = ".2f") -> str:
    """Return the median and the range of values, as text."""
    middle = f"{statistics.median(values):{form}}"
    if len(values) == 1:
        return middle
    return f"{middle} ({min(values):{form}} to {max(values):{form}})"


def pass_promises(report: dict[str, Any]) -> list[Promise]:
    """Return the targets of `budgetformer bench pass` on real texts, from its report.json."""
    times = {(t["name"], t["batch"]): t["ms_per_text"] for t in report["timings"]}
    full = report["full"]
    _, last, precision = full.replace(",", "").split()
    sixth, balanced = f"step {int(last) // 6}, {precision}", f"balanced, {precision}"
    dense, int8 = "dense, Transformers sdpa", "dense, ONNX Runtime int8"
    targets = [
        ("a sixth of the heads / all heads", sixth, full, {1: 0.3, 32: 0.22}),
        ("all heads / dense in Transformers", full, dense, {1: 0.8, 32: 0.6}),
        ("`balanced` / dense in ONNX Runtime int8", balanced, int8, {1: 0.15, 32: 0.05}),
    ]
    return [
        Promise(
            f"pass: time of {what}, batch {batch}", "<=", bound,
            [times[of, batch] / times[to, batch]], needs_real_texts=of == balanced,
        )
        for what, of, to, bounds in targets
        for batch, bound in bounds.items()
    ]  # fmt: skip
