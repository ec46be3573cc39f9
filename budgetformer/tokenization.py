"""Texts to tokens: cut to a model's length, at a cost that grows no faster than the text.

What the Rust tokenizer raises, its panics among it, is an error of ours.
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
"""A text, or a pair of them."""
Side: TypeAlias = Literal["right", "left"]

STEP_CHARACTERS = 2**16
"""Characters of one step, about a tenth of a second; a text that cannot be split is one step."""
_CHARACTERS_PER_TOKEN = 6
"""More than texts have on average, so that the first part of a text is mostly enough."""
_FEW_CHARACTERS_PER_TOKEN = 2
"""Fewer than texts have on average, so that hardly any text with so few must be cut."""
_BEFORE_SPACE = re.compile(r"(?<=\S) (?=\S)")
_BEFORE_SPACE_OR_IDEOGRAPH = re.compile(
    rf"{_BEFORE_SPACE.pattern}|(?<=[\u4e00-\u9fff])(?=[\u4e00-\u9fff])"
)
_SPLITTABLE = re.compile(r"[\s\u4e00-\u9fff]")
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


@dataclass(frozen=True, slots=True)
class Tokens:
    """The tokens of a text or pair as a model reads them, special ones included.

    Attributes:
        ids, type_ids: of the encoder's window; no `type_ids` means type 0 throughout.
        truncated: whether the window leaves some out.
        whole, whole_type_ids: what step 0 reads; no `whole` means that the window holds all of it.
    """

    ids: list[int]
    type_ids: list[int] | None
    truncated: bool
    whole: list[int] | None = None
    whole_type_ids: list[int] | None = None

    def __len__(self) -> int:
        return len(self.ids)


class TextEncoder:
    """Tokenize texts and pairs, cut to a model's length exactly as the tokenizer would cut them.

    The tokenizer's own truncation keeps all that it cuts off, and for a pair every combination of
    its parts: memory grows with the square of the length. Here a text is read in parts, from the
    end that is kept, until there are enough tokens. Splitting needs words that are tokenized each
    by itself; a text for another kind of tokenizer is read whole.

    Args:
        tokenizer: becomes this object's own, without truncation and padding.
        max_tokens: of a text or pair in the encoder's window, special tokens included.
        side: the end that is cut off.
        whole_tokens: likewise for `Tokens.whole`; up to `max_tokens` there is none.
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
        self._whole_tokens = max(max_tokens, whole_tokens)
        self._templates = [_Template(tokenizer, sequences) for sequences in (1, 2)]
        self._split = _split_pattern(tokenizer)
        self._first = min(_CHARACTERS_PER_TOKEN * self._whole_tokens, STEP_CHARACTERS)
        # Without a post-processor the tokenizer's fast call gives both texts of a pair one type.
        typed = tokenizer.post_processor is not None
        self._short = _FEW_CHARACTERS_PER_TOKEN * max_tokens if typed else -1

    def encode(self, texts: Sequence[Text]) -> list[Tokens]:
        """Tokenize texts and pairs.

        Raises:
            TokenizerError: the tokenizer fails at a text, which is named by its place alone.
        """
        return [tokens for finished in self.steps(texts) for tokens in finished]

    def steps(self, texts: Sequence[Text]) -> Iterator[list[Tokens]]:
        """Do the same in steps of bounded work, and yield the texts that each step finished.

        Raises:
            TokenizerError: as `encode` does.
        """
        group: list[Text] = []
        size = begin = 0
        for place, text in enumerate(texts):
            first = min(characters(text), 2 * self._first)
            if group and size + first > STEP_CHARACTERS:
                yield from self._read(begin, group)
                group, size, begin = [], 0, place
            group.append(text)
            size += first
        yield from self._read(begin, group)

    def words(self, ids: Sequence[int]) -> list[str]:
        """Return the vocabulary entry of each token."""
        return [self.tokenizer.id_to_token(token) or "" for token in ids]

    def _read(self, begin: int, texts: list[Text]) -> Iterator[list[Tokens]]:
        """Tokenize a group of texts, of which the first has the place `begin`."""
        found = self._at_once(texts)
        items = [self._item(begin + at, text) for at, text in enumerate(texts) if found[at] is None]
        cut: list[Tokens] = []
        if items:
            yield []
            for cut in self._finish(items):
                if not cut:
                    yield []
        rest = iter(cut)
        yield [next(rest) if tokens is None else tokens for tokens in found]

    def _at_once(self, texts: list[Text]) -> Sequence[Tokens | None]:
        """Tokenize texts in one call if all are short; None stands for one that must be cut."""
        none = [None] * len(texts)
        if any(characters(text) > self._short for text in texts):
            return none
        try:
            found = self._encode(texts, special=True)
        except TokenizerError:  # the place of the text is found one by one
            return none
        most = self._max_tokens
        single, pair = self._templates
        typed = [(single if isinstance(text, str) else pair).typed for text in texts]
        return [
            Tokens(e.ids, e.type_ids if own else None, False) if len(e) <= most else None
            for e, own in zip(found, typed, strict=True)
        ]

    def _item(self, place: int, text: Text) -> _Item:
        sequences = (text,) if isinstance(text, str) else text
        template = self._templates[len(sequences) - 1]
        room, whole_room = (
            max(0, tokens - template.special) for tokens in (self._max_tokens, self._whole_tokens)
        )
        parts = [
            _Reading(place, sequence, self._side, whole_room, self._first) for sequence in sequences
        ]
        return _Item(template, room, whole_room, parts)

    def _finish(self, items: list[_Item]) -> Iterator[list[Tokens]]:
        """Read a group of texts as far as it matters; all but the last step finish none."""
        while wanted := [reading for item in items for reading in item.wanted()]:
            batch: list[tuple[_Reading, str]] = []
            size = 0
            for reading in wanted:
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
            found = self._encode([part for _, part in batch])
        except TokenizerError:
            found = [self._encode_one(reading.place, part) for reading, part in batch]
        for (reading, _), encoding in zip(batch, found, strict=True):
            reading.add(encoding)

    def _encode_one(self, place: int, part: str) -> Encoding:
        try:
            return self._encode([part])[0]
        except TokenizerError:  # its message may quote the text
            raise TokenizerError(f"the tokenizer fails at text {place}", place) from None

    def _encode(self, texts: Sequence[Text], special: bool = False) -> list[Encoding]:
        with tokenizer_errors():
            return self.tokenizer.encode_batch_fast(texts, add_special_tokens=special)


def characters(text: Text) -> int:
    """Return the length of a text or pair."""
    return len(text) if isinstance(text, str) else len(text[0]) + len(text[1])


def _split_pattern(tokenizer: Tokenizer) -> re.Pattern[str] | None:
    """Return where a text may be split so that its parts have the tokens of the whole.

    Before a single space, and between two ideographs where each is a word. None: nowhere.
    """
    words, normalizer = tokenizer.pre_tokenizer, tokenizer.normalizer
    added = tokenizer.get_added_tokens_decoder().values()
    if any(_SPLITTABLE.search(token.content) for token in added):
        return None
    if isinstance(words, ByteLevel):
        # A space belongs to the word after it, unless the token before takes it.
        kept = normalizer is None and words.use_regex and not any(t.rstrip for t in added)
        return _BEFORE_SPACE if kept else None
    if not isinstance(words, BertPreTokenizer | Whitespace | WhitespaceSplit):
        return None
    if isinstance(normalizer, BertNormalizer) and normalizer.handle_chinese_chars:
        return _BEFORE_SPACE_OR_IDEOGRAPH
    return _BEFORE_SPACE if normalizer is None or isinstance(normalizer, BertNormalizer) else None


class _Template:
    """Where the special tokens of a text or pair stand, learned from the tokenizer."""

    def __init__(self, tokenizer: Tokenizer, sequences: int) -> None:
        probe = Tokenizer(WordLevel({"x": 0}, "x"))
        probe.post_processor = tokenizer.post_processor
        encoding = probe.encode("x", None if sequences == 1 else "x")
        self._parts = list(zip(encoding.sequence_ids, encoding.ids, encoding.type_ids, strict=True))
        self.special = len(self._parts) - sequences
        self.typed = any(encoding.type_ids)
        """Whether a token has another type than 0."""

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
    """A text that is read in parts, from the end that is kept.

    `count` tokens were found so far, of which `ids` holds those that the model may read.
    """

    __slots__ = (
        "_begin",
        "_end",
        "_room",
        "_side",
        "_window",
        "count",
        "ids",
        "more",
        "place",
        "text",
    )

    def __init__(self, place: int, text: str, side: Side, room: int, window: int) -> None:
        self.place = place
        self.text = text
        self.ids: list[int] = []
        self.count = 0
        self.more = True
        self._side = side
        self._room = room
        self._window = window
        self._begin, self._end = 0, len(text)

    def next_part(self, split: re.Pattern[str] | None) -> str:
        """Return the part that follows, at least twice as long as the one before."""
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
        """Take the tokens of the part that was read last."""
        self.count += len(encoding)
        if missing := self._room - len(self.ids):
            if self._side == "right":
                self.ids += encoding.ids[:missing]
            else:
                self.ids = encoding.ids[-missing:] + self.ids

    def kept(self, count: int) -> list[int]:
        """Return the ids of so many tokens."""
        return self.ids[:count] if self._side == "right" else self.ids[len(self.ids) - count :]


@dataclass(frozen=True, slots=True)
class _Item:
    """A text or pair that is being read.

    `room` tokens of it fit into the encoder's window, `whole_room` into what step 0 reads.
    """

    template: _Template
    room: int
    whole_room: int
    parts: list[_Reading]

    def wanted(self) -> list[_Reading]:
        """Return the texts of which more can matter."""
        wanted = [part for part in self.parts if part.more and part.count <= self.whole_room]
        if wanted or len(self.parts) == 1:
            return wanted
        # Half of an odd room is rounded up for the longer text, so both are counted until it is
        # known which one that is.
        first, second = self.parts
        shorter = first if first.count <= second.count else second
        halved = any(
            room % 2 and shorter.count > room // 2 for room in (self.room, self.whole_room)
        )
        return [shorter] if halved and shorter.more else []

    def tokens(self) -> Tokens:
        """Return the tokens that truncation keeps."""
        ids, type_ids = self._cut(self.room)
        if sum(part.count for part in self.parts) <= self.room:
            return Tokens(ids, type_ids, False)
        whole = self._cut(self.whole_room) if self.whole_room > self.room else (None, None)
        return Tokens(ids, type_ids, True, *whole)

    def _cut(self, room: int) -> tuple[list[int], list[int] | None]:
        """Return the token ids and type ids of the item cut to so many tokens."""
        shares = self._shares([part.count for part in self.parts], room)
        return self.template.fill(
            [part.kept(share) for part, share in zip(self.parts, shares, strict=True)]
        )

    @staticmethod
    def _shares(counts: list[int], room: int) -> list[int]:
        """Return how many tokens of each text are kept: the longer one is cut first."""
        if sum(counts) <= room:
            return counts
        if len(counts) == 1:
            return [room]
        shorter = min(min(counts), room // 2)
        shares = [shorter, room - shorter]
        return shares if counts[0] <= counts[1] else shares[::-1]
