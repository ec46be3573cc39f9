"""Things that are almost right."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

INPUTS = int(os.environ.get("FUZZ_INPUTS", "1000"))
"""How many inputs all fuzzed tests take together."""

odd = st.sampled_from(
    [
        None,
        True,
        False,
        0,
        -1,
        1,
        2**31,
        2**63,
        -(2**63) - 1,
        1e308,
        0.5,
        -0.0,
        "",
        "\x00",
        "a" * 300,
    ]
    + [
        "\U0001f9a6",
        "../..",
        [],
        {},
        [[]],
        [None],
        {"": None},
        [1, "a"],
        {"text": 5},
        "NaN",
        "1e400",
    ]
).map(copy.deepcopy)  # what is drawn may be changed
junk = st.recursive(
    odd | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
    ),
    max_leaves=6,
)


def fuzzed(share: float) -> settings:
    """Return the settings of a fuzzed test that takes a share of all inputs.

    A few are the same at every run; many are others at each.
    """
    return settings(
        max_examples=max(1, round(share * INPUTS)),
        deadline=None,
        derandomize="FUZZ_INPUTS" not in os.environ,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


@st.composite
def mutated_bytes(draw: st.DrawFn, sample: bytes) -> bytes:
    """Draw a sample with a few of its parts changed, cut, doubled or moved."""
    data = bytearray(sample)
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(data)))
        end = min(len(data), start + draw(st.integers(0, 8)))
        match draw(st.integers(0, 4)):
            case 0:
                data[start:end] = draw(st.binary(max_size=8))
            case 1:
                del data[start:end]
            case 2:
                data[start:start] = data[start:end]
            case 3:
                del data[start:]
            case _ if start < len(data):
                data[start] ^= 1 << draw(st.integers(0, 7))
    return bytes(data)


@st.composite
def mutated_json(draw: st.DrawFn, sample: Any) -> Any:
    """Draw a sample with a few of its values replaced, taken out, renamed or joined by others."""
    value = copy.deepcopy(sample)
    for _ in range(draw(st.integers(1, 3))):
        value = _mutate(draw, value)
    return value


def _mutate(draw: st.DrawFn, value: Any) -> Any:
    if not isinstance(value, (dict, list)) or not value or draw(st.integers(0, 9)) == 0:
        return draw(junk)
    keys: list[Any] = sorted(value) if isinstance(value, dict) else list(range(len(value)))
    key = draw(st.sampled_from(keys))
    steps: list[Callable[[], Any]] = [
        lambda: value.__setitem__(key, _mutate(draw, value[key])),
        lambda: value.__setitem__(key, _mutate(draw, value[key])),
        lambda: value.__setitem__(key, draw(junk)),
        lambda: value.pop(key),
        lambda: (
            value.__setitem__(draw(st.text(max_size=8)), draw(junk))
            if isinstance(value, dict)
            else value.insert(key, draw(junk))
        ),
    ]
    draw(st.sampled_from(steps))()
    return value
