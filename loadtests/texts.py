"""Texts to send: real ones from a file, or synthetic news."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

SUBJECTS = (
    "The council",
    "A young striker",
    "The central bank",
    "The space agency",
    "Its baseline",
)
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


def distinct(count: int, seed: int, words: list[str]) -> list[str]:
    """Return distinct texts: half begin like news, half are random words.

    Args:
        count: number of texts.
        seed: seed of the random choice.
        words: words that the texts consist of.
    """
    draw = random.Random(seed)
    texts: dict[str, None] = {}
    while len(texts) < count:
        if len(texts) % 2:
            text = " ".join([*map(draw.choice, (SUBJECTS, VERBS)), *draw.choices(words, k=2)])
        else:
            text = " ".join(draw.choices(words, k=draw.randint(2, 5)))
        texts[text] = None
    return list(texts)


def texts_of(data: Path | None, count: int) -> list[str]:
    """Return texts from a table's column `text`, or synthetic ones if `data` is None.

    Every call gives the same texts. Synthetic texts have one to five sentences. Of a table with
    fewer than `count` texts, all are returned.
    """
    draw = random.Random(0)
    if data is not None:
        from budgetformer.tables import read_texts

        texts, _ = read_texts(data)
        return draw.sample(texts, min(count, len(texts)))
    random.seed(0)
    return [" ".join(sentence() for _ in range(draw.randint(1, 5))) for _ in range(count)]


def with_repeats(new: Sequence[str], share: float, seed: int) -> list[str]:
    """Return `len(new)` texts, of which about a `share` repeat earlier ones of the result.

    The others are texts of `new`, in order.
    """
    draw = random.Random(seed)
    sent: list[str] = []
    fresh = iter(new)
    for _ in new:
        sent.append(draw.choice(sent) if sent and draw.random() < share else next(fresh))
    return sent
