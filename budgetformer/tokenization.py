"""Tokenize texts and truncate them to a model's length, in time linear in the text.

Exceptions and panics of the Rust tokenizer become `TokenizerError`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, TypeAlias

from tokenizers import Encoding, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer, ByteLevel, Whitespace, WhitespaceSplit

from budgetformer.errors import TokenizerError, one_line

Text: TypeAlias = str | tuple[str, str]
"""A text or a pair of texts."""
Side: TypeAlias = Literal["right", "left"]

STEP_CHARACTERS = 2**16
"""Maximum characters per step, about 0.1 s of work; a text that cannot be split is one step."""
_CHARACTERS_PER_TOKEN = 6
"""Above the average of texts, so that the first part of a text usually suffices."""
_FEW_CHARACTERS_PER_TOKEN = 3
"""Below the average of most languages, so that shorter texts seldom need truncation."""
_BEFORE_SPACE = re.compile(r"(?<=\S) (?=\S)")
_BEFORE_SPACE_OR_IDEOGRAPH = re.compile(
    rf"{_BEFORE_SPACE.pattern}|(?<=[\u4e00-\u9fff])(?=[\u4e00-\u9fff])"
)
_SPLITTABLE = re.compile(r"[\s\u4e00-\u9fff]")
_PANIC = "PanicException"
"""Class name of pyo3's panics; it cannot be imported and does not derive from `Exception`."""


@contextmanager
def tokenizer_errors() -> Iterator[None]:
    """Convert exceptions of the tokenizer in this block to `TokenizerError`."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != _PANIC:
            raise
        raise TokenizerError(one_line(error) or type(error).__name__) from None


@dataclass(frozen=True, slots=True)
class Tokens:
    """The tokens of a text or pair, including special tokens.

    Attributes:
        ids, type_ids: tokens in the encoder's window, and their types; None: all types are 0.
        truncated: whether the text is longer than the window.
        full_ids, full_type_ids: tokens of the full text, which step 0 reads; None if the text fits
            into the window.
    """

    ids: list[int]
    type_ids: list[int] | None
    truncated: bool
    full_ids: list[int] | None = None
    full_type_ids: list[int] | None = None

    def __len__(self) -> int:
        return len(self.ids)


class TextEncoder:
    """A tokenizer with its usual truncation, but in memory that is linear in the text.

    The tokenizer's own truncation keeps all overflowing tokens, and for a pair every combination of
    overflowing parts, so its memory grows with the square of the length. This class reads a text in
    parts, starting at the end that is kept, until it has enough tokens. That requires a tokenizer
    whose words are tokenized independently; for others, it reads the full text.

    Args:
        tokenizer: tokenizer that only this object uses; its truncation and padding are turned off.
        max_tokens: length of the encoder's window, including special tokens.
        side: end of a text that is cut off.
        whole_tokens: maximum length of `Tokens.full_ids`; up to `max_tokens`: no full texts.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        max_tokens: int,
        side: Side = "right",
        whole_tokens: int = 0,
    ) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self.tokenizer = tokenizer
        self._side = side
        self._max_tokens = max_tokens
        self._full_tokens = max(max_tokens, whole_tokens)
        self._templates = [_Template(tokenizer, sequences) for sequences in (1, 2)]
        self._split = _split_pattern(tokenizer)
        self._first = min(_CHARACTERS_PER_TOKEN * self._full_tokens, STEP_CHARACTERS)
        # Without a post-processor, `encode_batch_fast` gives both texts of a pair the same type.
        typed = tokenizer.post_processor is not None
        self._short = _FEW_CHARACTERS_PER_TOKEN * max_tokens if typed else -1

    def encode(self, texts: Sequence[Text]) -> list[Tokens]:
        """Tokenize texts and pairs.

        Raises:
            TokenizerError: the tokenizer fails on a text; the message has its index, not the text.
        """
        return [tokens for finished in self.steps(texts) for tokens in finished]

    def steps(self, texts: Sequence[Text]) -> Iterator[list[Tokens]]:
        """Tokenize in steps of bounded work, and yield the tokens of the texts that each completes.

        Raises:
            TokenizerError: as `encode` does.
        """
        group: list[Text] = []
        size = begin = 0
        for index, text in enumerate(texts):
            first = min(characters(text), 2 * self._first)
            if group and size + first > STEP_CHARACTERS:
                yield from self._read(begin, group)
                group, size, begin = [], 0, index
            group.append(text)
            size += first
        yield from self._read(begin, group)

    def words(self, ids: Sequence[int]) -> list[str]:
        """Return the vocabulary entry of each token id."""
        return [self.tokenizer.id_to_token(token) or "" for token in ids]

    def _read(self, begin: int, texts: list[Text]) -> Iterator[list[Tokens]]:
        """Tokenize a group of texts, of which the first has index `begin`."""
        complete = self._at_once(texts)
        items = [self._item(begin + i, text) for i, text in enumerate(texts) if complete[i] is None]
        truncated: list[Tokens] = []
        if items:
            yield []
            for truncated in self._finish(items):
                if not truncated:
                    yield []
        rest = iter(truncated)
        yield [next(rest) if tokens is None else tokens for tokens in complete]

    def _at_once(self, texts: list[Text]) -> Sequence[Tokens | None]:
        """Tokenize texts in one call if all are short; return None for texts to truncate."""
        none = [None] * len(texts)
        if any(characters(text) > self._short for text in texts):
            return none
        try:
            encodings = self._encode(texts, special=True)
        except TokenizerError:  # tokenizing the texts one by one finds the one that fails
            return none
        single, pair = self._templates
        typed = [(single if isinstance(text, str) else pair).typed for text in texts]
        return [
            Tokens(e.ids, e.type_ids if has_types else None, False)
            if len(e) <= self._max_tokens
            else None
            for e, has_types in zip(encodings, typed, strict=True)
        ]

    def _item(self, index: int, text: Text) -> _Item:
        sequences = (text,) if isinstance(text, str) else text
        template = self._templates[len(sequences) - 1]
        room, full_room = (
            max(0, tokens - template.special) for tokens in (self._max_tokens, self._full_tokens)
        )
        parts = [
            _Reading(index, sequence, self._side, full_room, self._first) for sequence in sequences
        ]
        return _Item(template, room, full_room, parts)

    def _finish(self, items: list[_Item]) -> Iterator[list[Tokens]]:
        """Read as much of a group of texts as needed; only the last step completes texts."""
        while unfinished := [reading for item in items for reading in item.unfinished()]:
            batch: list[tuple[_Reading, str]] = []
            size = 0
            for reading in unfinished:
                part = reading.next_part(self._split)
                if batch and size + len(part) > STEP_CHARACTERS:
                    self._tokenize(batch)
                    yield []
                    batch, size = [], 0
                batch.append((reading, part))
                size += len(part)
            self._tokenize(batch)
            yield []
        yield [item.tokens() for item in items]

    def _tokenize(self, batch: list[tuple[_Reading, str]]) -> None:
        try:
            encodings = self._encode([part for _, part in batch])
        except TokenizerError:
            encodings = [self._encode_one(reading.index, part) for reading, part in batch]
        for (reading, _), encoding in zip(batch, encodings, strict=True):
            reading.add(encoding)

    def _encode_one(self, index: int, part: str) -> Encoding:
        try:
            return self._encode([part])[0]
        except TokenizerError:  # the message may quote the text
            raise TokenizerError(f"the tokenizer failed on text {index}", index) from None

    def _encode(self, texts: Sequence[Text], special: bool = False) -> list[Encoding]:
        with tokenizer_errors():
            return self.tokenizer.encode_batch_fast(texts, add_special_tokens=special)


def characters(text: Text) -> int:
    """Return the length of a text or pair in characters."""
    return len(text) if isinstance(text, str) else len(text[0]) + len(text[1])


def _split_pattern(tokenizer: Tokenizer) -> re.Pattern[str] | None:
    """Return a pattern that matches where a text can be split without changing its tokens.

    That is before a single space, and between two ideographs if each is a word. None: a text cannot
    be split.
    """
    words, normalizer = tokenizer.pre_tokenizer, tokenizer.normalizer
    added = tokenizer.get_added_tokens_decoder().values()
    if any(_SPLITTABLE.search(token.content) for token in added):
        return None
    if isinstance(words, ByteLevel):
        # A space belongs to the next word, unless an added token before it strips it.
        kept = normalizer is None and words.use_regex and not any(t.rstrip for t in added)
        return _BEFORE_SPACE if kept else None
    if not isinstance(words, BertPreTokenizer | Whitespace | WhitespaceSplit):
        return None
    if isinstance(normalizer, BertNormalizer) and normalizer.handle_chinese_chars:
        return _BEFORE_SPACE_OR_IDEOGRAPH
    return _BEFORE_SPACE if normalizer is None or isinstance(normalizer, BertNormalizer) else None


class _Template:
    """Positions of the special tokens in a text or pair, learned from the tokenizer."""

    def __init__(self, tokenizer: Tokenizer, sequences: int) -> None:
        probe = Tokenizer(WordLevel({"x": 0}, "x"))
        probe.post_processor = tokenizer.post_processor
        encoding = probe.encode("x", None if sequences == 1 else "x")
        self._parts = list(zip(encoding.sequence_ids, encoding.ids, encoding.type_ids, strict=True))
        self.special = len(self._parts) - sequences
        self.typed = any(encoding.type_ids)
        """Whether any token's type is not 0."""

    def fill(self, sequences: list[list[int]]) -> tuple[list[int], list[int] | None]:
        """Return the token ids and type ids of a text or pair with its special tokens."""
        ids: list[int] = []
        type_ids: list[int] = []
        for sequence, special, kind in self._parts:
            part = [special] if sequence is None else sequences[sequence]
            ids += part
            type_ids += [kind] * len(part)
        return ids, type_ids if self.typed else None


class _Reading:
    """A text that is read in parts, starting at the end that is kept.

    Attributes:
        index: index of the text or pair.
        text: the text.
        count: number of tokens read so far.
        ids: token ids read so far that truncation may keep.
        more: whether a part of the text has not been read.
    """

    __slots__ = (
        "_begin",
        "_end",
        "_room",
        "_side",
        "_window",
        "count",
        "ids",
        "index",
        "more",
        "text",
    )

    def __init__(self, index: int, text: str, side: Side, room: int, window: int) -> None:
        self.index = index
        self.text = text
        self.ids: list[int] = []
        self.count = 0
        self.more = True
        self._side = side
        self._room = room
        self._window = window
        self._begin, self._end = 0, len(text)

    def next_part(self, split: re.Pattern[str] | None) -> str:
        """Return the next part, at least twice as long as the previous one."""
        begin, end = self._begin, self._end
        if split is not None and self._side == "right":
            if found := split.search(self.text, begin + self._window):
                end = found.start()
            self._begin = end
        elif split is not None:
            while (begin := max(0, end - self._window)) > 0:
                if found := split.search(self.text, begin, end):
                    begin = found.start()
                    break
                self._window *= 2
            self._end = begin
        else:
            self._begin = end
        self._window = min(2 * self._window, STEP_CHARACTERS)
        self.more = self._begin < self._end
        return self.text[begin:end]

    def add(self, encoding: Encoding) -> None:
        """Add the tokens of the part that was read last."""
        self.count += len(encoding)
        if missing := self._room - len(self.ids):
            if self._side == "right":
                self.ids += encoding.ids[:missing]
            else:
                self.ids = encoding.ids[-missing:] + self.ids

    def kept(self, count: int) -> list[int]:
        """Return the ids of the `count` tokens at the end that is kept."""
        return self.ids[:count] if self._side == "right" else self.ids[len(self.ids) - count :]


@dataclass(frozen=True, slots=True)
class _Item:
    """A text or pair that is being read.

    Attributes:
        template: positions of the special tokens.
        room, full_room: maximum tokens in the encoder's window and in step 0's input, without
            special tokens.
        parts: the text, or both texts of the pair.
    """

    template: _Template
    room: int
    full_room: int
    parts: list[_Reading]

    def unfinished(self) -> list[_Reading]:
        """Return the texts that must be read further."""
        unfinished = [part for part in self.parts if part.more and part.count <= self.full_room]
        if unfinished or len(self.parts) == 1:
            return unfinished
        # The longer text gets the larger half of an odd room, so tokens must be counted until it is
        # clear which text is longer.
        first, second = self.parts
        shorter = first if first.count <= second.count else second
        halved = any(room % 2 and shorter.count > room // 2 for room in (self.room, self.full_room))
        return [shorter] if halved and shorter.more else []

    def tokens(self) -> Tokens:
        """Return the truncated tokens."""
        ids, type_ids = self._cut(self.room)
        if sum(part.count for part in self.parts) <= self.room:
            return Tokens(ids, type_ids, False)
        full_ids = self._cut(self.full_room) if self.full_room > self.room else (None, None)
        return Tokens(ids, type_ids, True, *full_ids)

    def _cut(self, room: int) -> tuple[list[int], list[int] | None]:
        """Return the token ids and type ids, truncated to `room` tokens without special ones."""
        shares = self._shares([part.count for part in self.parts], room)
        return self.template.fill(
            [part.kept(share) for part, share in zip(self.parts, shares, strict=True)]
        )

    @staticmethod
    def _shares(counts: list[int], room: int) -> list[int]:
        """Return the number of tokens to keep of each text; the longer text is cut first."""
        if sum(counts) <= room:
            return counts
        if len(counts) == 1:
            return [room]
        shorter = min(min(counts), room // 2)
        shares = [shorter, room - shorter]
        return shares if counts[0] <= counts[1] else shares[::-1]
