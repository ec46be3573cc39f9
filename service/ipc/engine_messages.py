"""Messages of frontends and the hub to an engine, and of an engine to them.

`service.ipc.frames` defines the encoding. Values per text or token are sent as columns: the raw
bytes of little-endian arrays.

Shapes: B texts, N tokens, C labels, S steps.
"""

from __future__ import annotations

from typing import ClassVar, TypeAlias

import msgspec
import numpy as np

from budgetformer.inference.decider import Decided
from budgetformer.inference.policy import QualityName
from budgetformer.inference.texts import Texts, TokenColumns
from budgetformer.model.tfidf import Array
from service.ipc.answers import Answers
from service.ipc.frames import FrameError, Message, decoder

PROTOCOL = 10


class SentTokens(msgspec.Struct, frozen=True, array_like=True):
    """Encoded `TokenColumns`: int32 columns; `types` empty: every token has type 0."""

    ids: bytes
    lengths: bytes
    types: bytes = b""

    @classmethod
    def of(cls, columns: TokenColumns) -> SentTokens:
        """Encode token columns."""
        types = b"" if columns.types is None else pack(columns.types, "<i4")
        return cls(pack(columns.ids, "<i4"), pack(columns.lengths, "<i4"), types)

    def read(self) -> TokenColumns:
        """Decode token columns.

        Raises:
            FrameError: the lengths of the columns do not match.
        """
        ids, lengths = unpack(self.ids, "<i4"), unpack(self.lengths, "<i4")
        types = unpack(self.types, "<i4") if self.types else None
        columns = TokenColumns(ids, lengths, types)
        if min(columns.counts, default=0) < 0 or sum(columns.counts) != len(ids):
            raise FrameError("the lengths of the texts do not add up to the number of tokens")
        if types is not None and len(types) != len(ids):
            raise FrameError("there must be one token type per token")
        return columns


class SentTexts(msgspec.Struct, frozen=True, array_like=True):
    """Encoded `Texts`; `full_text` None: the same as `window`."""

    window: SentTokens
    full_text: SentTokens | None = None

    @classmethod
    def of(cls, texts: Texts, step0_reads: bool = True) -> SentTexts:
        """Encode texts.

        Args:
            texts: texts.
            step0_reads: whether the engine decides; if it does not, full texts are left out.
        """
        window = SentTokens.of(texts.window)
        if texts.full_text is texts.window or not step0_reads:
            return cls(window)
        return cls(window, SentTokens.of(texts.full_text))

    def read(self) -> Texts:
        """Decode texts.

        Raises:
            FrameError: the lengths of the columns do not match.
        """
        window = self.window.read()
        full_text = window if self.full_text is None else self.full_text.read()
        if len(full_text) != len(window):
            raise FrameError("there must be one full text per truncated text")
        return Texts(window, full_text)


class Decisions(msgspec.Struct, frozen=True, array_like=True):
    """Encoded `Decided`: the decision of a frontend about B texts.

    Attributes:
        steps: ladder step that each text runs first, at least 1, int32 [B].
        s: output of f_o, float32 [B].
        exit_logits: logits of step 0, float32 [B, C]; empty: the network has no step 0.
    """

    steps: bytes
    s: bytes
    exit_logits: bytes = b""

    @classmethod
    def of(cls, decided: Decided) -> Decisions:
        """Encode the decision about texts none of which step 0 answers."""
        logits = decided.exit_logits
        return cls(
            pack(decided.steps, "<i4"),
            pack(decided.s, "<f4"),
            b"" if logits is None else pack(logits, "<f4"),
        )

    def read(self, texts: int, classes: int) -> Decided:
        """Decode decisions.

        Args:
            texts: number of texts, B.
            classes: number of labels of step 0, C; 0: the network has no step 0.

        Raises:
            FrameError: the lengths of the columns do not match B and C, or a step is below 1.
        """
        steps, s = unpack(self.steps, "<i4"), unpack(self.s, "<f4")
        logits = unpack(self.exit_logits, "<f4")
        if not len(steps) == len(s) == texts or len(logits) != texts * classes:
            raise FrameError("there must be one decision per text")
        if min(steps.tolist(), default=1) < 1:
            raise FrameError("texts that step 0 answers must not be sent to an engine")
        asked = np.zeros(texts, bool)
        return Decided(steps, asked, s, logits.reshape(texts, classes) if classes else None)


class Classify(Message, frozen=True):
    """Classify B texts with one model; the answer is `Answer`, `Refused`, `Expired` or `Failed`.

    Attributes:
        quality: quality level, or accuracy drop (percentage points); "auto": the engine chooses.
        remaining: seconds until the deadline.
        heads, max_heads: fixed and highest number of heads per layer; None: no limit.
        return_heads: whether the answers name the computed heads.
        target: seconds that the answer should take, by which the engine chooses the quality.
        request_id, traceparent: identity of the request in logs and traces (W3C).
        steps: first step of each text that another engine has begun, int32 [B]; empty: no text.
        decisions: decisions of the frontend; None: the engine decides.
        bulk: whether the texts wait in the bulk lane, regardless of their number.
    """

    id: int
    model: str
    version: int
    texts: SentTexts
    quality: str | float
    remaining: float
    heads: int | None = None
    max_heads: int | None = None
    return_heads: bool = False
    target: float | None = None
    request_id: str = ""
    traceparent: str = ""
    steps: bytes = b""
    decisions: Decisions | None = None
    bulk: bool = False


class Cancel(Message, frozen=True):
    """Cancel a `Classify` or a `Load`: its answer is not needed any more."""

    id: int


class Load(Message, frozen=True):
    """Load, verify and warm up the checkpoint folder `path`, then serve it beside the others."""

    id: int
    path: str


class Unload(Message, frozen=True):
    """Stop serving a model version, and free it when no text waits for it."""

    id: int
    model: str
    version: int


class Configure(Message, frozen=True):
    """Apply these settings, those of the server and those of single models.

    Attributes:
        quality_floor: lowest level that overload may give to requests of quality `auto`.
        model_floors: the same by model, for models that set it.
        queue_items: maximum number of waiting texts by model, for models that set it.
        warm_up_steps: ladder steps by model that later loads warm up.
    """

    id: int
    log_level: str
    quality_floor: QualityName
    model_floors: dict[str, QualityName]
    queue_items: dict[str, int]
    warm_up_steps: dict[str, list[int]]


class ModelInfo(msgspec.Struct, frozen=True, array_like=True):
    """A model that an engine serves."""

    name: str
    version: int
    load_seconds: float
    memory_bytes: int
    dtype: str


class SubscribeBatches(Message, frozen=True):
    """Send a `BatchReport` to this peer after every batch from now on."""


class Hello(Message, frozen=True):
    """First message of an engine; a new engine has no models yet."""

    protocol: int
    pid: int
    device: str
    torch: str
    models: list[ModelInfo]


class Models(Message, frozen=True):
    """The models of an engine have changed; `models` are all of them."""

    models: list[ModelInfo]


class Heartbeat(Message, frozen=True):
    """An engine is alive, and this is the state of its queue, by model.

    Attributes:
        quality: quality level in force for requests of quality `auto`.
    """

    droppable: ClassVar[bool] = True

    queue_items: dict[str, int]
    queue_seconds: dict[str, float]
    oldest_age: dict[str, float]
    in_flight: dict[str, int]
    memory_bytes: int
    quality: QualityName


class LevelChanged(Message, frozen=True):
    """The quality level in force, as in `Heartbeat`, has changed."""

    quality: QualityName


class SentAnswers(msgspec.Struct, frozen=True, array_like=True):
    """Encoded `Answers`; `next_step` empty: every text has its answer."""

    logits: bytes
    step: bytes
    predicted: bytes
    ran: bytes
    heads: bytes
    macs: bytes
    dense_macs: bytes
    next_step: bytes = b""
    chosen: list[list[list[int]]] | None = None
    errors: dict[int, str] = {}

    @classmethod
    def of(cls, answers: Answers) -> SentAnswers:
        """Encode answers."""
        unfinished = answers.next_step.any()
        return cls(
            pack(answers.logits, "<f4"),
            pack(answers.step, "<i4"),
            pack(answers.predicted, "<i4"),
            pack(answers.ran, "?"),
            pack(answers.heads, "<i4"),
            pack(answers.macs, "<i8"),
            pack(answers.dense_macs, "<i8"),
            pack(answers.next_step, "<i4") if unfinished else b"",
            answers.chosen,
            dict(answers.errors),
        )

    def read(self) -> Answers:
        """Decode answers.

        Raises:
            FrameError: the lengths of the columns do not match.
        """
        step = unpack(self.step, "<i4")
        count = len(step)
        logits, ran = unpack(self.logits, "<f4"), unpack(self.ran, "?")
        single = [
            step,
            unpack(self.predicted, "<i4"),
            unpack(self.heads, "<i4"),
            unpack(self.macs, "<i8"),
            unpack(self.dense_macs, "<i8"),
            unpack(self.next_step, "<i4") if self.next_step else np.zeros(count, np.int32),
        ]
        rows = [len(logits), len(ran)]
        chosen = count if self.chosen is None else len(self.chosen)
        if {chosen, *map(len, single)} != {count} or (count and any(n % count for n in rows)):
            raise FrameError("the columns of an answer differ in length")
        step, predicted, heads, macs, dense_macs, next_step = single
        return Answers(
            logits.reshape(count, -1) if count else logits.reshape(0, 0),
            step,
            predicted,
            ran.reshape(count, -1) if count else ran.reshape(0, 0),
            heads,
            macs,
            dense_macs,
            next_step,
            self.chosen,
            self.errors,
        )


class Answer(Message, frozen=True):
    """The answers of a request; the other attributes are those of `Answers`."""

    id: int
    answers: SentAnswers
    budget_seconds: float
    queue_seconds: float
    compute_seconds: float
    quality: str | float


class Refused(Message, frozen=True):
    """A request was not admitted."""

    id: int
    reason: str
    retry_after: int


class Expired(Message, frozen=True):
    """A request's deadline passed before it was computed."""

    id: int


class Failed(Message, frozen=True):
    """A message could not be handled: a load failed, or a request named an unknown model."""

    id: int
    message: str


class Done(Message, frozen=True):
    """A load or unload succeeded, or settings were applied."""

    id: int


class BatchReport(Message, frozen=True):
    """A batch ran; it is sent to peers that have sent `SubscribeBatches`.

    Attributes:
        checked, clipped: number of int8 states that were checked since the last batch of the model,
            and of those outside their calibrated range.
        dropped: number of earlier batches that were not reported because the peer did not read.
    """

    droppable: ClassVar[bool] = True

    model: str
    version: int
    budget: int
    items: int
    tokens: int
    padding: float
    seconds: float
    checked: int = 0
    clipped: int = 0
    dropped: int = 0


ToEngine: TypeAlias = Classify | Cancel | Load | Unload | SubscribeBatches | Configure
ToFrontend: TypeAlias = (
    Hello
    | Models
    | Heartbeat
    | LevelChanged
    | Answer
    | Refused
    | Expired
    | Failed
    | Done
    | BatchReport
)

TO_ENGINE = decoder(ToEngine)
TO_FRONTEND = decoder(ToFrontend)


def pack(column: Array, dtype: str) -> bytes:
    """Encode a column as an array of this type, which is little-endian."""
    return column.astype(dtype, copy=False).tobytes()


def unpack(data: bytes, dtype: str) -> Array:
    """Decode a column of this type into an array, which may be read-only.

    Raises:
        FrameError: the number of bytes is not a multiple of the item size.
    """
    item = np.dtype(dtype)
    if len(data) % item.itemsize:
        raise FrameError(f"column of {len(data)} bytes, expected a multiple of {item.itemsize}")
    return np.frombuffer(data, item).astype(item.newbyteorder("="), copy=False)
