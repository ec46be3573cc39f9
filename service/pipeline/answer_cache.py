"""A frontend's cache of answers, so that repeated texts are not computed again.

Shapes: B texts, of which M are not in the cache; C labels, S steps.
"""

from __future__ import annotations

import secrets
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from hashlib import blake2b
from typing import Any

import msgspec
import numpy as np

from budgetformer.model.tfidf import Array
from budgetformer.tokenization import Text
from service.ipc.answers import COLUMNS, Answers
from service.pipeline.served_models import ServedModel

KEY_BYTES = 16
ENTRY_BYTES = 300
"""Estimated memory of a cached answer beside its columns: its key and its dictionary entry."""


@dataclass(frozen=True)
class AnsweredTexts:
    """The answers to the texts of a request, and the sizes of the texts.

    Attributes:
        lengths: number of tokens of each text that the encoder may read, int32 [B].
        truncated: whether a text has more tokens than that, bool [B].
        answers: answers to the texts.
    """

    lengths: Array
    truncated: Array
    answers: Answers


@dataclass(frozen=True)
class AnswerOptions:
    """The options that an answer depends on, beside the model and the text.

    Attributes:
        quality: quality level or accuracy drop (percentage points); for "auto", the level in force.
        heads, max_heads: head limits of the request.
        caller: name of the key that may reuse the answer; empty: every caller may.
    """

    quality: str | float
    heads: int | None = None
    max_heads: int | None = None
    caller: str = ""


class AnswerCache:
    """Keep answers in memory, and drop the least recently used ones above a limit.

    Texts are identified by keyed hashes. The key is random, so nobody can construct a collision.

    Args:
        max_bytes: limit of the memory for answers, keys and dictionary entries.
        changed: called with the bytes in use whenever they change.
    """

    def __init__(self, max_bytes: int, changed: Callable[[int], None] = lambda _: None) -> None:
        self.bytes = 0
        """Memory in use."""
        self._max_bytes = max_bytes
        self._changed = changed
        self._secret = secrets.token_bytes(blake2b.MAX_KEY_SIZE)
        self._rows: OrderedDict[tuple[ServedModel, bytes], bytes] = OrderedDict()

    def __len__(self) -> int:
        return len(self._rows)

    def look_up(self, model: ServedModel, options: AnswerOptions, texts: Sequence[Text]) -> Lookup:
        """Return the cached answers to B texts, and the texts that have none."""
        options_hash = blake2b(key=self._secret, digest_size=KEY_BYTES)
        options_hash.update(msgspec.msgpack.encode(options))
        keys = []
        for text in texts:
            text_hash = options_hash.copy()
            text_hash.update(msgspec.msgpack.encode(text))
            keys.append((model, text_hash.digest()))
        rows = [self._rows.get(key) for key in keys]
        for key, row in zip(keys, rows, strict=True):
            if row is not None:
                self._rows.move_to_end(key)
        return Lookup(self, options, keys, rows, texts)

    def keep(self, key: tuple[ServedModel, bytes], row: bytes) -> None:
        """Cache the columns of one answer, unless it exceeds the limit alone."""
        size = len(row) + ENTRY_BYTES
        if key in self._rows:
            self._drop(key)
        if size <= self._max_bytes:
            self._rows[key] = row
            self.bytes += size
        while self.bytes > self._max_bytes:
            self._drop(next(iter(self._rows)))
        self._changed(self.bytes)

    def forget(self, model: ServedModel) -> None:
        """Drop the answers of a model version that no request uses any more."""
        for key in [key for key in self._rows if key[0] is model]:
            self._drop(key)
        self._changed(self.bytes)

    def _drop(self, key: tuple[ServedModel, bytes]) -> None:
        self.bytes -= len(self._rows.pop(key)) + ENTRY_BYTES


class Lookup:
    """The cached answers to the texts of one request, and the texts that have none.

    Args:
        cache: cache that was searched.
        options: options that the answers depend on.
        keys: cache keys of the texts, [B].
        cached: columns of each answer, [B]; None: it is not cached.
        texts: texts of the request, [B].

    Attributes:
        options: as given.
        misses: indices of the texts that are not cached, [M].
        missing: those texts, [M].
    """

    def __init__(
        self,
        cache: AnswerCache,
        options: AnswerOptions,
        keys: list[tuple[ServedModel, bytes]],
        cached: list[bytes | None],
        texts: Sequence[Text],
    ) -> None:
        self.options = options
        self.misses = [index for index, row in enumerate(cached) if row is None]
        self.missing = [texts[index] for index in self.misses]
        self._cache, self._keys, self._cached = cache, keys, cached

    @property
    def outcome(self) -> str:
        """`hit` if all texts are cached, `miss` if none is, else `partial`."""
        if not self.misses:
            return "hit"
        return "partial" if len(self.misses) < len(self._keys) else "miss"

    @cached_property
    def hits(self) -> Array:
        """Whether each text is cached, bool [B]."""
        hits: Array = np.array([row is not None for row in self._cached])
        return hits

    @cached_property
    def _rows(self) -> Any:
        """The columns of all B texts; 0 where no answer is cached."""
        rows: Any = np.zeros(len(self._keys), self._row_type)
        cached = b"".join(row for row in self._cached if row is not None)
        rows[self.hits] = np.frombuffer(cached, rows.dtype)
        return rows

    @property
    def _row_type(self) -> np.dtype[Any]:
        checkpoint = self._keys[0][0].checkpoint
        return _row_type(len(checkpoint.manifest.labels), len(checkpoint.ladder))

    @property
    def truncated(self) -> Array:
        """Whether each cached text has more tokens than the encoder reads, bool [B]."""
        return np.ascontiguousarray(self._rows["truncated"])

    def complete(self, computed: AnsweredTexts | None) -> AnsweredTexts:
        """Return the answers to all B texts, and cache the new ones.

        Args:
            computed: answers to the `misses`; None: there were no misses.
        """
        if computed is None:
            return self._all_answers(quality=self.options.quality)
        new = self._keep(computed)
        if len(self.misses) == len(self._keys):
            return computed
        self._rows[self.misses] = new
        answers = computed.answers
        return self._all_answers(
            errors={self.misses[index]: error for index, error in answers.errors.items()},
            budget_seconds=answers.budget_seconds,
            queue_seconds=answers.queue_seconds,
            compute_seconds=answers.compute_seconds,
            quality=answers.quality,
        )

    def _keep(self, computed: AnsweredTexts) -> Any:
        """Cache the answers to the M misses that did not fail, and return the columns of all M."""
        answers = computed.answers
        new: Any = np.zeros(len(self.misses), self._row_type)
        new["lengths"], new["truncated"] = computed.lengths, computed.truncated
        for name in COLUMNS:
            new[name] = getattr(answers, name)
        # The level in force may have changed between the lookup and the engine's answer.
        if answers.quality == self.options.quality:
            for row, index in enumerate(self.misses):
                if row not in answers.errors:
                    self._cache.keep(self._keys[index], new[row].tobytes())
        return new

    def _all_answers(self, **attributes: Any) -> AnsweredTexts:
        columns: dict[str, Any] = {name: np.ascontiguousarray(self._rows[name]) for name in COLUMNS}
        lengths = np.ascontiguousarray(self._rows["lengths"])
        return AnsweredTexts(lengths, self.truncated, Answers(**columns, **attributes))


@cache
def _row_type(labels: int, steps: int) -> np.dtype[Any]:
    """Return the type of a cached row: the columns of `Answers`, and the size of the text."""
    shapes = {"logits": (labels,), "ran": (steps + 1,)}
    types = COLUMNS | {"lengths": "<i4", "truncated": "?"}
    return np.dtype([(name, dtype, shapes.get(name, ())) for name, dtype in types.items()])
