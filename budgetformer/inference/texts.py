"""The tokens of many texts as columns: what travels between processes, and what passes read.

Shapes: B texts, N tokens.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import numpy as np

from budgetformer.model.tfidf import Array
from budgetformer.tokenization import Tokens


@dataclass(frozen=True, eq=False)
class TokenColumns:
    """The token ids of B texts, one text after another.

    Attributes:
        ids: int32 [N].
        lengths: tokens of each text, int32 [B].
        types: token types, int32 [N]; None: 0 throughout.
    """

    ids: Array
    lengths: Array
    types: Array | None = None

    def __len__(self) -> int:
        return len(self.lengths)

    @cached_property
    def counts(self) -> list[int]:
        """The lengths as plain numbers."""
        found: list[int] = self.lengths.tolist()
        return found

    @cached_property
    def bounds(self) -> list[int]:
        """The place of each text's first token, and behind them the end of the last: B + 1."""
        return [0, *accumulate(self.counts)]

    @classmethod
    def of(
        cls, ids: Sequence[Sequence[int]], types: Sequence[Sequence[int] | None] | None = None
    ) -> TokenColumns:
        """Put texts one after another; a text without types has type 0 throughout."""
        lengths = np.fromiter(map(len, ids), np.int32, len(ids))
        column = None
        if types is not None and any(map(any, filter(None, types))):
            column = _column([own or [0] * len(text) for own, text in zip(types, ids, strict=True)])
        return cls(_column(ids), lengths, column)

    @classmethod
    def join(cls, parts: Sequence[TokenColumns]) -> TokenColumns:
        """Put the texts of several columns one after another."""
        if len(parts) == 1:
            return parts[0]
        types = None
        if any(part.types is not None for part in parts):
            types = np.concatenate(
                [np.zeros_like(part.ids) if part.types is None else part.types for part in parts]
            )
        return cls(
            np.concatenate([part.ids for part in parts]),
            np.concatenate([part.lengths for part in parts]),
            types,
        )

    def take(self, places: Sequence[int]) -> TokenColumns:
        """Return the texts at some places, in the order of these."""
        if len(places) == len(self) and list(places) == list(range(len(self))):
            return self
        bounds = self.bounds
        slices = [slice(bounds[place], bounds[place + 1]) for place in places]
        return TokenColumns(
            _gather(self.ids, slices),
            self.lengths[list(places)],
            None if self.types is None else _gather(self.types, slices),
        )


@dataclass(frozen=True, eq=False)
class Texts:
    """B texts as the encoder and step 0 read them.

    Attributes:
        window: what the encoder reads.
        whole: what step 0 reads; the same object where the window leaves nothing out.
    """

    window: TokenColumns
    whole: TokenColumns

    def __len__(self) -> int:
        return len(self.window)

    @classmethod
    def of(cls, texts: Sequence[Tokens]) -> Texts:
        """Make columns of tokenized texts."""
        window = TokenColumns.of([text.ids for text in texts], [text.type_ids for text in texts])
        if all(text.whole is None for text in texts):
            return cls(window, window)
        ids = [text.ids if text.whole is None else text.whole for text in texts]
        types = [text.type_ids if text.whole is None else text.whole_type_ids for text in texts]
        return cls(window, TokenColumns.of(ids, types))

    @classmethod
    def join(cls, parts: Sequence[Texts]) -> Texts:
        """Put the texts of several columns one after another."""
        window = TokenColumns.join([part.window for part in parts])
        if all(part.whole is part.window for part in parts):
            return cls(window, window)
        return cls(window, TokenColumns.join([part.whole for part in parts]))

    def take(self, places: Sequence[int]) -> Texts:
        """Return the texts at some places, in the order of these."""
        window = self.window.take(places)
        return Texts(window, window if self.whole is self.window else self.whole.take(places))


def _gather(column: Array, slices: Sequence[slice]) -> Array:
    if len(slices) == 1:
        return column[slices[0]]
    return np.concatenate([column[own] for own in slices]) if slices else column[:0]


def _column(texts: Sequence[Sequence[int]]) -> Array:
    numbers = array("i")
    for text in texts:
        numbers.extend(text)
    return np.frombuffer(numbers, np.int32)
