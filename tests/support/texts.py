"""Synthetic labelled sentences and a small WordPiece tokenizer for them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import product

import numpy as np
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from tokenizers.processors import BertProcessing

from budgetformer.training.data import Examples

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
TOPICS = {
    "garden": (
        ["The gardener", "A neighbour", "My aunt"],
        ["planted", "watered"],
        ["roses", "beans"],
    ),
    "harbour": (
        ["The captain", "A sailor", "The crew"],
        ["anchored", "painted"],
        ["a ferry", "a tug"],
    ),
    "kitchen": (["The cook", "A baker", "Our guest"], ["baked", "tasted"], ["bread", "a pie"]),
}
ENDINGS = ["", " today", " again before noon", " while the others were still asleep upstairs"]


def sentences(topic: str) -> list[str]:
    """Return 48 sentences of 3 to 9 words about one topic."""
    who, did, what = TOPICS[topic]
    return [f"{a} {b} {c}{d}." for a, b, c, d in product(who, did, what, ENDINGS)]


def topic_examples() -> Examples:
    """Return 144 sentences labelled with their topic, with alternating topics."""
    names = list(TOPICS)
    rows = [
        (s, i) for group in zip(*map(sentences, names), strict=True) for i, s in enumerate(group)
    ]
    return Examples([s for s, _ in rows], None, np.array([i for _, i in rows]), names)


def small_tokenizer() -> Tokenizer:
    """Build the tokenizer of the synthetic sentences."""
    return tokenizer_for(topic_examples().texts)


def tokenizer_for(texts: Iterable[str]) -> Tokenizer:
    """Build a WordPiece tokenizer for the words of some texts, with long words in two pieces.

    It is not trained, because training breaks ties differently in every process, so that no two
    runs would train the same network.
    """
    words = sorted({word for text in texts for word in re.findall("[a-z]+", text.lower())})
    letters = sorted(set("".join(words)))
    starts = [*letters, ".", *(word[:4] if len(word) > 6 else word for word in words)]
    ends = [*letters, *(word[4:] for word in words if len(word) > 6)]
    pieces = dict.fromkeys([*SPECIAL, *starts, *(f"##{end}" for end in ends)])
    tokenizer = Tokenizer(
        WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]")
    )
    tokenizer.normalizer = BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = BertPreTokenizer()
    tokenizer.post_processor = BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return tokenizer
