"""The tokens of many texts as columns, which processes exchange and passes read.

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
        ids: token ids, int32 [N].
        lengths: number of tokens of each text, int32 [B].
        types: token types, int32 [N]; None: all 0.
    """

    ids: Array
    lengths: Array
    types: Array | None = None

    def __len__(self) -> int:
        return len(self.lengths)

    @cached_property
    def counts(self) -> list[int]:
        """The lengths as Python integers."""
        counts: list[int] = self.lengths.tolist()
        return counts

    @cached_property
    def bounds(self) -> list[int]:
        """Index of each text's first token, then the end of the last text: B + 1 numbers."""
        return [0, *accumulate(self.counts)]

    @classmethod
    def of(
        cls, ids: Sequence[Sequence[int]], types: Sequence[Sequence[int] | None] | None = None
    ) -> TokenColumns:
        """Return the columns of some texts; a text without types has type 0 throughout."""
        lengths = np.fromiter(map(len, ids), np.int32, len(ids))
        column = None
        if types is not None and any(map(any, filter(None, types))):
            column = _column([own or [0] * len(text) for own, text in zip(types, ids, strict=True)])
        return cls(_column(ids), lengths, column)

    @classmethod
    def join(cls, parts: Sequence[TokenColumns]) -> TokenColumns:
        """Concatenate several columns."""
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
        """Return the texts with these indices, in this order."""
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
    """The encoder's and step 0's view of B texts.

    Attributes:
        window: the truncated texts, which the encoder reads.
        full_text: the full texts, which step 0 reads; the same object if none is truncated.
    """

    window: TokenColumns
    full_text: TokenColumns

    def __len__(self) -> int:
        return len(self.window)

    @classmethod
    def of(cls, texts: Sequence[Tokens]) -> Texts:
        """Return the columns of tokenized texts."""
        window = TokenColumns.of([text.ids for text in texts], [text.type_ids for text in texts])
        if all(text.full_ids is None for text in texts):
            return cls(window, window)
        ids = [text.ids if text.full_ids is None else text.full_ids for text in texts]
        types = [text.type_ids if text.full_ids is None else text.full_type_ids for text in texts]
        return cls(window, TokenColumns.of(ids, types))

    @classmethod
    def join(cls, parts: Sequence[Texts]) -> Texts:
        """Concatenate several columns."""
        window = TokenColumns.join([part.window for part in parts])
        if all(part.full_text is part.window for part in parts):
            return cls(window, window)
        return cls(window, TokenColumns.join([part.full_text for part in parts]))

    def take(self, places: Sequence[int]) -> Texts:
        """Return the texts with these indices, in this order."""
        window = self.window.take(places)
        return Texts(
            window, window if self.full_text is self.window else self.full_text.take(places)
        )


def _gather(column: Array, slices: Sequence[slice]) -> Array:
    if len(slices) == 1:
        return column[slices[0]]
    return np.concatenate([column[part] for part in slices]) if slices else column[:0]


def _column(texts: Sequence[Sequence[int]]) -> Array:
    numbers = array("i")
    for text in texts:
        numbers.extend(text)
    return np.frombuffer(numbers, np.int32)
