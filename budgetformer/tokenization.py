"""What the Rust tokenizer raises, its panics among it, as an error of ours."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from tokenizers import Encoding, Tokenizer

from budgetformer.errors import TokenizerError, one_line

_PANIC = "PanicException"
"""Of pyo3, which has no module that it could be imported from, and is no `Exception`."""


@contextmanager
def tokenizer_errors() -> Iterator[None]:
    """Raise what the tokenizer raises in this block as `TokenizerError`."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != _PANIC:
            raise
        told = one_line(error) or type(error).__name__
        raise TokenizerError(told) from None


def encode(tokenizer: Tokenizer, texts: Sequence[str | tuple[str, str]]) -> list[Encoding]:
    """Tokenize texts and pairs; an encoding that overflows was truncated, and has no offsets.

    Raises:
        TokenizerError: the tokenizer fails at a text, which is named by its place alone.
    """
    try:
        with tokenizer_errors():
            return tokenizer.encode_batch_fast(list(texts))
    except TokenizerError:
        return [_encode_one(tokenizer, place, text) for place, text in enumerate(texts)]


def _encode_one(tokenizer: Tokenizer, place: int, text: str | tuple[str, str]) -> Encoding:
    try:
        with tokenizer_errors():
            return tokenizer.encode_batch_fast([text])[0]
    except TokenizerError:  # what it says may quote the text
        raise TokenizerError(f"the tokenizer fails at text {place}", place) from None
