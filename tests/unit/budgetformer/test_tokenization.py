"""The tokenizer's errors and panics."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import FixedLength, Whitespace

from budgetformer.errors import TokenizerError
from budgetformer.tokenization import encode, tokenizer_errors


def knows(*words: str) -> Tokenizer:
    """Return a tokenizer that fails at any other word."""
    tokenizer = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, "none"))
    tokenizer.pre_tokenizer = Whitespace()
    return tokenizer


def test_texts_are_tokenized_in_their_order() -> None:
    found = encode(knows("fog", "otter"), ["otter fog", "fog"])
    assert [encoding.ids for encoding in found] == [[1, 0], [0]]


def test_a_text_that_it_fails_at_is_named_by_its_place_and_not_quoted() -> None:
    with pytest.raises(TokenizerError, match="text 1") as caught:
        encode(knows("fog"), ["fog", "xyzzy", "fog"])
    assert caught.value.place == 1
    assert "xyzzy" not in str(caught.value)


def test_a_panic_is_an_error() -> None:
    tokenizer = knows("fog")
    tokenizer.pre_tokenizer = FixedLength(length=0)
    with pytest.raises(TokenizerError) as caught:
        encode(tokenizer, ["", "fog"])
    assert caught.value.place == 1


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_what_ends_the_program_is_none(error: type[BaseException]) -> None:
    with pytest.raises(error), tokenizer_errors():
        raise error
