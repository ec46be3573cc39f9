"""Tokenization: truncation equals the tokenizer's, its cost is bounded, errors name the text."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE, Unigram, WordLevel
from tokenizers.pre_tokenizers import FixedLength, Whitespace
from tokenizers.trainers import BpeTrainer

from budgetformer.checkpoint.store import load_tokenizer, read_checkpoint
from budgetformer.errors import TokenizerError
from budgetformer.tokenization import (
    STEP_CHARACTERS,
    Side,
    Text,
    TextEncoder,
    Tokens,
    tokenizer_errors,
)
from tests.support.networks import PROPERTY
from tests.support.texts import small_tokenizer

SHIPPED = Path(__file__).parents[3] / "model_store"
SENTENCE = (
    "The gardener's aunt re-planted 12 roses, today; e\u0301l\u00e8ve \u6f22\u5b57 \U0001f600!"
)
BERT = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))


def bert(**options: Any) -> Tokenizer:
    tokenizer = small_tokenizer()
    tokenizer.normalizer = normalizers.BertNormalizer(**options)
    return tokenizer


def byte_level(**options: Any) -> Tokenizer:
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(**options)
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([SENTENCE] * 3, trainer)
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    return tokenizer


def byte_level_with_mask(*, lstrip: bool, rstrip: bool) -> Tokenizer:
    tokenizer = byte_level(add_prefix_space=False)
    tokenizer.add_special_tokens([AddedToken("[MASK]", lstrip=lstrip, rstrip=rstrip)])
    return tokenizer


def unigram() -> Tokenizer:
    pieces = [("<unk>", 0.0), ("\u2581", -2.0), ("\u2581the", -3.0), ("to", -4.0), *_letters()]
    tokenizer = Tokenizer(Unigram(pieces, 0, byte_fallback=False))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    return tokenizer


def _letters() -> Iterator[tuple[str, float]]:
    return ((letter, -6.0) for letter in "abcdefghijklmnopqrstuvwxyz")


def with_added(content: str) -> Tokenizer:
    tokenizer = bert()
    tokenizer.add_tokens([AddedToken(content)])
    return tokenizer


def word_level() -> Tokenizer:
    tokenizer = Tokenizer(WordLevel({"[UNK]": 0, "the": 1, "to": 2}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


def shipped(name: str) -> Tokenizer:
    folder = max((SHIPPED / name).glob("[0-9]*"))
    return load_tokenizer(read_checkpoint(folder))


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "small": small_tokenizer,
    "cased": lambda: bert(lowercase=False, strip_accents=False),
    "ideographs joined": lambda: bert(handle_chinese_chars=False, clean_text=False),
    "an added token": lambda: with_added("[the]"),
    "an added token with a space": lambda: with_added("to to"),
    "an added token with ideographs": lambda: with_added("\u6f22\u6f22"),
    "word-level": word_level,
    "byte-level": lambda: byte_level(add_prefix_space=False),
    "byte-level, prefix space": lambda: byte_level(add_prefix_space=True),
    "byte-level, one word": lambda: byte_level(add_prefix_space=True, use_regex=False),
    "byte-level, mask": lambda: byte_level_with_mask(lstrip=True, rstrip=False),
    "byte-level, mask takes spaces": lambda: byte_level_with_mask(lstrip=True, rstrip=True),
    "unigram": unigram,
    "ag_news": lambda: shipped("ag_news"),
    "banking77": lambda: shipped("banking77"),
    "imdb": lambda: shipped("imdb"),
}
PARTS = [
    "a", "the", "to", "the to", " ", "  ", "\n", "\t", "\u00a0", "\u3000", "\u2028", "\x00",
    "\x01", "\x1c", "\x85", "\u200b", "\u0301", "e\u0301", "\u0130", "\u0131\u0308", "\ufdfa",
    "\u00a8", "\u6f22", "\u6f22\u5b57", "\U00020000", "\ud55c", "\u1112\u1161", "\u3042",
    "\U0001f600", "\U0001f468\u200d\U0001f469", "'s", ".", "...", "[MASK]", "[the]", "to to",
    "x" * 120, "##the", "0123", "\ufffd", "\u0345", "\u03a3",
]  # fmt: skip
TEXTS = st.lists(
    st.tuples(st.sampled_from(PARTS) | st.text(max_size=3), st.integers(1, 30)), max_size=12
).map(lambda parts: "".join(part * times for part, times in parts))
LENGTHS = st.integers(3, 24)
# Tokens that step 0 reads beyond those of the encoder; none if negative.
BEYOND = st.integers(-4, 90)
# The tokenizer's own truncation of pairs takes quadratic time.
SHORTER = TEXTS.map(lambda text: text[:240])


@cache
def truncating(kind: str, side: Side, length: int) -> Tokenizer:
    """Return a tokenizer with its own truncation enabled."""
    tokenizer = new_tokenizer(kind)
    tokenizer.no_padding()
    tokenizer.enable_truncation(length, direction=side)
    return tokenizer


@cache
def encoders(
    kind: str, side: Side, length: int, whole: int
) -> tuple[Tokenizer, Tokenizer, TextEncoder]:
    """Return tokenizers that truncate to `length` and `whole`, and the encoder that does both."""
    expected = truncating(kind, side, length), truncating(kind, side, max(length, whole))
    return *expected, TextEncoder(new_tokenizer(kind), length, side, whole)


def new_tokenizer(kind: str) -> Tokenizer:
    return Tokenizer.from_str(tokenizer_json(kind))


@cache
def tokenizer_json(kind: str) -> str:
    return KINDS[kind]().to_str()


def check_same(kind: str, side: Side, length: int, beyond: int, texts: list[Text]) -> None:
    window, whole, encoder = encoders(kind, side, length, length + beyond)
    encoded = encoder.encode(texts)
    expected = zip(window.encode_batch(texts), whole.encode_batch(texts), strict=True)
    for text, (short, long), tokens in zip(texts, expected, encoded, strict=True):
        truncated = bool(short.overflowing)
        assert tokens.ids == short.ids, text
        assert types_of(tokens.ids, tokens.type_ids) == short.type_ids, text
        assert tokens.truncated == truncated
        if truncated and beyond > 0:
            assert tokens.full_ids == long.ids
            assert types_of(long.ids, tokens.full_type_ids) == long.type_ids
        else:
            assert tokens.full_ids is None


def types_of(ids: list[int], types: list[int] | None) -> list[int]:
    return [0] * len(ids) if types is None else types


@pytest.mark.parametrize("kind", KINDS)
@settings(PROPERTY, max_examples=40)
@given(
    side=st.sampled_from(["right", "left"]),
    length=LENGTHS,
    beyond=BEYOND,
    texts=st.lists(TEXTS, max_size=3),
)
@example(side="left", length=9, beyond=0, texts=["the [MASK] to " * 40, "\u6f22" * 90 + " a" * 90])
@example(side="left", length=9, beyond=50, texts=["the [MASK] to " * 40, "\u6f22" * 90])
@example(side="right", length=9, beyond=0, texts=["", " " * 400, "a" + " " * 400 + "b", "to " * 90])
@example(side="right", length=9, beyond=60, texts=["", " " * 400, "a b", "to to " * 90])
def test_texts_are_truncated_like_the_tokenizer_does(
    kind: str, side: Side, length: int, beyond: int, texts: list[Text]
) -> None:
    check_same(kind, side, length, beyond, texts)


@pytest.mark.parametrize("kind", KINDS)
@settings(PROPERTY, max_examples=40)
@given(
    side=st.sampled_from(["right", "left"]),
    length=st.integers(8, 24),
    beyond=BEYOND,
    pair=st.tuples(SHORTER, SHORTER),
)
@example(side="right", length=8, beyond=0, pair=("the to " * 40, "the " * 81))
@example(side="left", length=8, beyond=0, pair=("the " * 81, "the to " * 40))
@example(side="right", length=8, beyond=0, pair=("the " * 80, "the to " * 40))
@example(side="right", length=16, beyond=0, pair=("the", "the to " * 40))
# If the window or the whole has an odd number of tokens, the longer text gets one more.
@example(side="right", length=8, beyond=9, pair=("the to " * 40, "the " * 81))
@example(side="left", length=9, beyond=9, pair=("the " * 81, "the to " * 40))
@example(side="right", length=8, beyond=30, pair=("the " * 9, "the to " * 40))
def test_pairs_are_truncated_like_the_tokenizer_does(
    kind: str, side: Side, length: int, beyond: int, pair: tuple[str, str]
) -> None:
    check_same(kind, side, length, beyond, [pair])


class CountingTokenizer:
    """A tokenizer that records the number of characters of each call."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.calls: list[int] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def encode_batch_fast(self, texts: list[str], **options: Any) -> Any:
        self.calls.append(sum(map(len, texts)))
        return self._tokenizer.encode_batch_fast(texts, **options)


def counting_encoder(
    kind: str, side: Side = "right", length: int = 64, whole: int = 0
) -> tuple[TextEncoder, CountingTokenizer]:
    encoder = TextEncoder(new_tokenizer(kind), length, side, whole)
    counting = CountingTokenizer(encoder.tokenizer)
    encoder.tokenizer = counting  # type: ignore[assignment]
    return encoder, counting


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("kind", ["small", "byte-level", "ag_news"])
def test_only_the_start_or_end_of_a_long_text_is_tokenized(kind: str, side: Side) -> None:
    encoder, counting = counting_encoder(kind, side)
    encoder.encode(["the crew painted a tug. " * 4000])
    assert sum(counting.calls) < 2000


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_long_text_is_tokenized_as_far_as_step_0_needs(side: Side) -> None:
    encoder, counting = counting_encoder("small", side, whole=4096)
    (tokens,) = encoder.encode(["the crew painted a tug. " * 400_000])
    assert (len(tokens.ids), len(tokens.full_ids or ())) == (64, 4096)
    assert sum(counting.calls) < 2 * STEP_CHARACTERS
    assert max(counting.calls) < STEP_CHARACTERS


def test_a_short_text_is_tokenized_once_for_step_0_and_encoder() -> None:
    (plain, plain_counting), (reading, counting) = (
        counting_encoder("small", whole=n) for n in (0, 4096)
    )
    assert plain.encode(["the to"] * 9) == reading.encode(["the to"] * 9)
    assert plain_counting.calls == counting.calls == [54]


@pytest.mark.parametrize("whole", [0, 4096])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "text", ["the " * 25_000, "x" * 100_000, " " * 100_000, "\u6f22" * 100_000]
)
def test_no_character_is_tokenized_twice(kind: str, text: str, whole: int) -> None:
    encoder, counting = counting_encoder(kind, whole=whole)
    encoder.encode([(text, text)])
    assert sum(counting.calls) <= 2 * len(text)


@pytest.mark.parametrize("whole", [0, 900, 50_000])
def test_many_texts_are_tokenized_in_bounded_steps(whole: int) -> None:
    encoder, counting = counting_encoder("small", whole=whole)
    texts: list[Text] = ["the to " * 3000, ("to " * 9000, "to " * 8999), "", "the " * 9] * 40
    encoded: list[Tokens] = []
    for step, finished in enumerate(encoder.steps(texts), start=1):
        encoded += finished
        assert len(counting.calls) <= step
    assert len(encoded) == len(texts)
    assert len(counting.calls) > 10
    assert max(counting.calls) <= STEP_CHARACTERS + 10


def test_words_are_entries_of_the_vocabulary() -> None:
    expected, _, encoder = encoders("small", "right", 16, 0)
    (tokens,) = encoder.encode(["The crew painted \u2603."])
    assert encoder.words(tokens.ids) == expected.encode("The crew painted \u2603.").tokens


def failing_tokenizer(*words: str) -> Tokenizer:
    """Return a tokenizer that fails at any word but these."""
    tokenizer = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, "none"))
    tokenizer.pre_tokenizer = Whitespace()
    return tokenizer


def encode(tokenizer: Tokenizer, texts: list[Text]) -> list[Tokens]:
    return TextEncoder(tokenizer, 16).encode(texts)


def test_texts_are_tokenized_in_their_order() -> None:
    encoded = encode(failing_tokenizer("fog", "otter"), ["otter fog", "fog"])
    assert [tokens.ids for tokens in encoded] == [[1, 0], [0]]


def test_an_error_names_the_index_of_the_text_and_does_not_quote_it() -> None:
    with pytest.raises(TokenizerError, match="text 1") as caught:
        encode(failing_tokenizer("fog"), ["fog", "xyzzy", "fog"])
    assert caught.value.place == 1
    assert "xyzzy" not in str(caught.value)


def test_a_panic_of_the_tokenizer_is_a_tokenizer_error() -> None:
    tokenizer = failing_tokenizer("fog")
    tokenizer.pre_tokenizer = FixedLength(length=0)
    with pytest.raises(TokenizerError) as caught:
        encode(tokenizer, ["", "fog"])
    assert caught.value.place == 1


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_interrupts_are_not_tokenizer_errors(error: type[BaseException]) -> None:
    with pytest.raises(error), tokenizer_errors():
        raise error
