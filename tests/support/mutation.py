"""Almost valid inputs from a seeded generator that takes microseconds for each."""

from __future__ import annotations

import copy
import functools
import inspect
import math
import os
import secrets
import struct
from collections.abc import Callable
from random import Random
from typing import Any

INPUTS = int(os.environ.get("FUZZ_INPUTS", "200"))
"""The number of inputs for all fuzz tests of one target together."""
SEED = int(
    os.environ.get("FUZZ_SEED", secrets.randbelow(2**32) if "FUZZ_INPUTS" in os.environ else 0)
)
"""The default inputs are the same in every run; with FUZZ_INPUTS they vary, unless seeded."""

ODD: list[Any] = [
    None, True, False, 0, -1, 1, 2**31, 2**63, -(2**63) - 1, 1e308, 0.5, -0.0,
    "", "\x00", "a" * 300, "\U0001f9a6", "../..", "NaN", "1e400",
    [], {}, [[]], [None], {"": None}, [1, "a"], {"text": 5},
]  # fmt: skip
_CHARACTERS = [(0x20, 0x7E)] * 4 + [
    (0, 0x1F), (0x7F, 0xFF), (0x100, 0xD7FF), (0xE000, 0xFFFF), (0x10000, 0x10FFFF)
]  # fmt: skip
_SURROGATES = (0xD800, 0xDFFF)
_BITS = [1, 4, 8, 16, 31, 32, 53, 63, 64, 65, 128]


def fuzzed(share: float) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Run a test for a share of the inputs of its target, each with its own `random`."""

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(test)
        def run(**fixtures: Any) -> None:
            name = " ".join([test.__name__, *(v for v in fixtures.values() if isinstance(v, str))])
            for number in range(max(1, round(share * INPUTS))):
                try:
                    test(random=Random(f"{SEED} {name} {number}"), **fixtures)
                except Exception as error:
                    error.add_note(f"input {number} of FUZZ_SEED={SEED} FUZZ_INPUTS={INPUTS}")
                    raise

        signature = inspect.signature(test)
        kept = [value for name, value in signature.parameters.items() if name != "random"]
        run.__signature__ = signature.replace(parameters=kept)  # type: ignore[attr-defined]
        return run

    return decorate


def text(random: Random, longest: int, surrogates: bool = True) -> str:
    """Return a few characters, about half of them ASCII, possibly with lone surrogates."""
    ranges = [*_CHARACTERS, _SURROGATES] if surrogates else _CHARACTERS
    return "".join(
        chr(random.randint(*random.choice(ranges))) for _ in range(random.randint(0, longest))
    )


def junk(random: Random, depth: int = 2, surrogates: bool = True) -> Any:
    """Return a random JSON value that the caller may change."""
    match random.randrange(8 if depth else 6):
        case 0 | 1 | 2:
            return copy.deepcopy(random.choice(ODD))
        case 3:
            number = random.getrandbits(random.choice(_BITS))
            return random.choice((number, -number))
        case 4:
            number = struct.unpack("d", random.randbytes(8))[0]
            return number if math.isfinite(number) else random.uniform(-2, 2)
        case 5:
            return text(random, 8, surrogates)
        case 6:
            return [junk(random, depth - 1, surrogates) for _ in range(random.randint(0, 3))]
        case _:
            return {
                text(random, 6, surrogates): junk(random, depth - 1, surrogates)
                for _ in range(random.randint(0, 3))
            }


def mutated_bytes(random: Random, sample: bytes) -> bytes:
    """Return a sample with a few of its bytes replaced, removed, repeated or truncated."""
    data = bytearray(sample)
    for _ in range(random.randint(1, 4)):
        start = random.randint(0, len(data))
        end = min(len(data), start + random.randint(0, 8))
        match random.randrange(5):
            case 0:
                data[start:end] = random.randbytes(random.randint(0, 8))
            case 1:
                del data[start:end]
            case 2:
                data[start:start] = data[start:end]
            case 3:
                del data[start:]
            case _ if start < len(data):
                data[start] ^= 1 << random.randrange(8)
    return bytes(data)


def mutated_json(random: Random, sample: Any) -> Any:
    """Return a sample with a few of its values replaced, removed or added."""
    value = copy.deepcopy(sample)
    for _ in range(random.randint(1, 3)):
        value = _mutate(random, value)
    return value


def _mutate(random: Random, value: Any) -> Any:
    if not isinstance(value, (dict, list)) or not value or random.randrange(10) == 0:
        return junk(random)
    key = random.choice(list(value) if isinstance(value, dict) else range(len(value)))
    match random.randrange(5):
        case 0 | 1:
            value[key] = _mutate(random, value[key])
        case 2:
            value[key] = junk(random)
        case 3:
            value.pop(key)
        case _ if isinstance(value, dict):
            value[text(random, 8)] = junk(random)
        case _:
            value.insert(key, junk(random))
    return value
