"""Answers that a frontend keeps of texts that it was asked before.

Shapes: B texts, of which M have no answer yet; C labels, S steps.
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
"""What an answer takes beside its columns: its key, and its place in the dictionary."""


@dataclass(frozen=True)
class AnsweredTexts:
    """The texts of a request, and their answers.

    Attributes:
        lengths: tokens that the encoder may read of each text, int32 [B].
        truncated: whether a text has more, bool [B].
        answers: to the texts.
    """

    lengths: Array
    truncated: Array
    answers: Answers


@dataclass(frozen=True)
class Asked:
    """What the answer to a text depends on, beside the model and the text.

    Attributes:
        quality: level, or points given up; never "auto", but the level in force for it.
        heads, max_heads: of the request.
        caller: name of the key that answers are kept for; empty: for all.
    """

    quality: str | float
    heads: int | None = None
    max_heads: int | None = None
    caller: str = ""


class AnswerCache:
    """Keep answers in memory, and drop those that were used longest ago when they are too many.

    Texts are known by hashes under a random key, so that nobody can make two texts with one hash.

    Args:
        max_bytes: that the answers may take, their keys and places included.
        changed: told the bytes that they take, whenever that has changed.
    """

    def __init__(self, max_bytes: int, changed: Callable[[int], None] = lambda _: None) -> None:
        self.bytes = 0
        """Bytes that the answers take."""
        self._max_bytes = max_bytes
        self._changed = changed
        self._secret = secrets.token_bytes(blake2b.MAX_KEY_SIZE)
        self._rows: OrderedDict[tuple[ServedModel, bytes], bytes] = OrderedDict()

    def __len__(self) -> int:
        return len(self._rows)

    def look_up(self, model: ServedModel, asked: Asked, texts: Sequence[Text]) -> Lookup:
        """Return the answers to B texts that are kept, and which texts have none."""
        hashed = blake2b(key=self._secret, digest_size=KEY_BYTES)
        hashed.update(msgspec.msgpack.encode(asked))
        keys = []
        for text in texts:
            own = hashed.copy()
            own.update(msgspec.msgpack.encode(text))
            keys.append((model, own.digest()))
        found = [self._rows.get(key) for key in keys]
        for key, row in zip(keys, found, strict=True):
            if row is not None:
                self._rows.move_to_end(key)
        return Lookup(self, asked, keys, found, texts)

    def keep(self, key: tuple[ServedModel, bytes], row: bytes) -> None:
        """Keep the columns of one answer; of one that is larger than all may be, nothing."""
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
        """Drop the answers of a model version, once no request uses it."""
        for key in [key for key in self._rows if key[0] is model]:
            self._drop(key)
        self._changed(self.bytes)

    def _drop(self, key: tuple[ServedModel, bytes]) -> None:
        self.bytes -= len(self._rows.pop(key)) + ENTRY_BYTES


class Lookup:
    """What the cache knew of the texts of one request.

    Args:
        cache: that was asked.
        asked: what the answers depend on.
        keys: of the texts in the cache, [B].
        found: the columns of their answers; None: they are not kept.
        texts: of the request.

    Attributes:
        asked: as given.
        misses: the places of the texts without an answer, [M].
        missing: those texts.
    """

    def __init__(
        self,
        cache: AnswerCache,
        asked: Asked,
        keys: list[tuple[ServedModel, bytes]],
        found: list[bytes | None],
        texts: Sequence[Text],
    ) -> None:
        self.asked = asked
        self.misses = [place for place, row in enumerate(found) if row is None]
        self.missing = [texts[place] for place in self.misses]
        self._cache, self._keys, self._found = cache, keys, found

    @property
    def outcome(self) -> str:
        """`hit` if all texts have an answer, `miss` if none has, else `partial`."""
        if not self.misses:
            return "hit"
        return "partial" if len(self.misses) < len(self._keys) else "miss"

    @cached_property
    def hits(self) -> Array:
        """Whether each text has an answer, bool [B]."""
        found: Array = np.array([row is not None for row in self._found])
        return found

    @cached_property
    def _rows(self) -> Any:
        """The columns of all B texts; 0 where there is no answer yet."""
        rows: Any = np.zeros(len(self._keys), self._row_type)
        kept = b"".join(row for row in self._found if row is not None)
        rows[self.hits] = np.frombuffer(kept, rows.dtype)
        return rows

    @property
    def _row_type(self) -> np.dtype[Any]:
        checkpoint = self._keys[0][0].checkpoint
        return _row_type(len(checkpoint.manifest.labels), len(checkpoint.ladder))

    @property
    def truncated(self) -> Array:
        """Whether each text with an answer has more tokens than the encoder reads, bool [B]."""
        return np.ascontiguousarray(self._rows["truncated"])

    def complete(self, computed: AnsweredTexts | None) -> AnsweredTexts:
        """Return the answers to all B texts, and keep those that are new.

        Args:
            computed: the answers to the `misses`; None: there are none.
        """
        if computed is None:
            return self._whole(quality=self.asked.quality)
        new = self._keep(computed)
        if len(self.misses) == len(self._keys):
            return computed
        self._rows[self.misses] = new
        answers = computed.answers
        return self._whole(
            errors={self.misses[at]: error for at, error in answers.errors.items()},
            budget_seconds=answers.budget_seconds,
            queue_seconds=answers.queue_seconds,
            compute_seconds=answers.compute_seconds,
            quality=answers.quality,
        )

    def _keep(self, computed: AnsweredTexts) -> Any:
        """Keep the answers to the M misses that did not fail, and return the columns of all M."""
        answers = computed.answers
        new: Any = np.zeros(len(self.misses), self._row_type)
        new["lengths"], new["truncated"] = computed.lengths, computed.truncated
        for name in COLUMNS:
            new[name] = getattr(answers, name)
        # An engine may have answered at another level than the one in force a moment before.
        if answers.quality == self.asked.quality:
            for at, place in enumerate(self.misses):
                if at not in answers.errors:
                    self._cache.keep(self._keys[place], new[at].tobytes())
        return new

    def _whole(self, **more: Any) -> AnsweredTexts:
        columns: dict[str, Any] = {name: np.ascontiguousarray(self._rows[name]) for name in COLUMNS}
        lengths = np.ascontiguousarray(self._rows["lengths"])
        return AnsweredTexts(lengths, self.truncated, Answers(**columns, **more))


@cache
def _row_type(labels: int, steps: int) -> np.dtype[Any]:
    """Return the columns of one text as they are kept: those of `Answers`, and of its tokens."""
    own = {
        "logits": (np.float32, labels),
        "ran": (np.bool_, steps + 1),
        "macs": (np.int64, ()),
        "dense_macs": (np.int64, ()),
        "truncated": (np.bool_, ()),
    }
    names = (*COLUMNS, "lengths", "truncated")
    return np.dtype([(name, *own.get(name, (np.int32, ()))) for name in names])
