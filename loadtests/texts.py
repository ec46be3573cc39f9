"""News that nobody has read, made from parts."""

from __future__ import annotations

import random

SUBJECTS = ("The council", "A young striker", "The central bank", "The space agency", "Its rival")
VERBS = ("announced", "postponed", "welcomed", "rejected", "played down")
OBJECTS = (
    "a new plan for the harbour",
    "the result of the final",
    "higher interest rates",
    "the first test of the engine",
    "a merger worth billions",
)
ENDINGS = (
    "",
    " on Tuesday",
    " after weeks of talks",
    " and promised details by the end of the month",
)


def sentence() -> str:
    return (
        " ".join(random.choice(part) for part in (SUBJECTS, VERBS, OBJECTS))
        + random.choice(ENDINGS)
        + "."
    )
