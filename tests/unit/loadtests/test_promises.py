"""Promises of speed are judged by measurements."""

from __future__ import annotations

import pytest

from loadtests.promises import Promise, pass_promises


@pytest.mark.parametrize(
    ("sign", "reached", "verdict"),
    [(">=", [3.0, 4.0, 9.0], "pass"), (">=", [3.9], "short"), ("<=", [4.0, 4.1, 9.0], "short")],
)
def test_the_median_decides(sign: str, reached: list[float], verdict: str) -> None:
    assert Promise("throughput", sign, 4, reached).verdict == verdict


def test_promises_of_the_pass_are_judged_by_its_report() -> None:
    milliseconds = {
        "step 2, float32": 2.0, "step 12, float32": 10.0, "balanced, float32": 1.0,
        "dense, Transformers sdpa": 12.5, "dense, ONNX Runtime int8": 4.0,
    }  # fmt: skip
    timings = [
        {"name": name, "batch": batch, "ms_per_text": time}
        for name, time in milliseconds.items()
        for batch in (1, 32)
    ]
    promises = pass_promises({"full": "step 12, float32", "timings": timings})
    assert [p.reached for p in promises] == [[0.2], [0.2], [0.8], [0.8], [0.25], [0.25]]
    assert [p.verdict for p in promises] == ["pass", "pass", "pass", "short", "short", "short"]
    assert [p.needs_real_texts for p in promises] == [False, False, False, False, True, True]
