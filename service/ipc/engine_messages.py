"""What frontends and the hub say to an engine, and it to them; see `service.ipc.frames`.

Numbers of many texts travel as columns: the raw bytes of a little-endian array.

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

PROTOCOL = 9


class SentTokens(msgspec.Struct, frozen=True, array_like=True):
    """`TokenColumns`: ids and lengths, int32; no `types` means type 0 throughout."""

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
            FrameError: the columns do not fit together.
        """
        ids, lengths = unpack(self.ids, "<i4"), unpack(self.lengths, "<i4")
        types = unpack(self.types, "<i4") if self.types else None
        columns = TokenColumns(ids, lengths, types)
        if min(columns.counts, default=0) < 0 or sum(columns.counts) != len(ids):
            raise FrameError("the lengths of texts do not add up to their tokens")
        if types is not None and len(types) != len(ids):
            raise FrameError("there must be as many token types as tokens")
        return columns


class SentTexts(msgspec.Struct, frozen=True, array_like=True):
    """`Texts`: what the encoder reads, and what step 0 does; None: the same."""

    window: SentTokens
    full_text: SentTokens | None = None

    @classmethod
    def of(cls, texts: Texts, step0_reads: bool = True) -> SentTexts:
        """Encode texts; what step 0 reads is left out if nobody has to decide any more."""
        window = SentTokens.of(texts.window)
        if texts.full_text is texts.window or not step0_reads:
            return cls(window)
        return cls(window, SentTokens.of(texts.full_text))

    def read(self) -> Texts:
        """Decode texts.

        Raises:
            FrameError: the columns do not fit together.
        """
        window = self.window.read()
        full_text = window if self.full_text is None else self.full_text.read()
        if len(full_text) != len(window):
            raise FrameError("step 0 must read as many texts as the encoder")
        return Texts(window, full_text)


class Decisions(msgspec.Struct, frozen=True, array_like=True):
    """What a frontend has decided of texts: the step that each runs first, 1 or more, int32.

    `s` holds f_o's verdicts, float32; `exit_logits` step 0's logits, float32 [B, C], and is empty
    for a network without a step 0.
    """

    steps: bytes
    s: bytes
    exit_logits: bytes = b""

    @classmethod
    def of(cls, decided: Decided) -> Decisions:
        """Encode what was decided of texts of which step 0 answers none."""
        logits = decided.exit_logits
        return cls(
            pack(decided.steps, "<i4"),
            pack(decided.s, "<f4"),
            b"" if logits is None else pack(logits, "<f4"),
        )

    def read(self, texts: int, classes: int) -> Decided:
        """Decode decisions.

        Args:
            texts: how many there are.
            classes: labels C of step 0; 0: there is none.

        Raises:
            FrameError: they are not as many numbers as the texts of this network have.
        """
        steps, s = unpack(self.steps, "<i4"), unpack(self.s, "<f4")
        logits = unpack(self.exit_logits, "<f4")
        if not len(steps) == len(s) == texts or len(logits) != texts * classes:
            raise FrameError("there must be as many decisions as texts")
        if min(steps.tolist(), default=1) < 1:
            raise FrameError("step 0 needs no engine")
        asked = np.zeros(texts, bool)
        return Decided(steps, asked, s, logits.reshape(texts, classes) if classes else None)


class Classify(Message, frozen=True):
    """Classify texts with one model; `remaining` seconds until the answer is worthless.

    A quality of "auto" leaves the level to the engine; so does `target`, the seconds that the
    answer should take. `request_id` and the W3C `traceparent` name the request in logs and traces.
    `decisions` are the frontend's; None: the engine decides. `steps` are the ladder steps, int32,
    at which texts begin that another engine decided and began; empty: there is none. `bulk` texts
    wait in the bulk lane, however few they are.
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
    """Nobody waits for the answer to a `Classify` or a `Load` any more."""

    id: int


class Load(Message, frozen=True):
    """Load, verify and warm the checkpoint folder `path`, then serve it beside what was."""

    id: int
    path: str


class Unload(Message, frozen=True):
    """Stop serving a model version and free it, once nothing waits for it."""

    id: int
    model: str
    version: int


class Configure(Message, frozen=True):
    """Go by these settings from now on: the server's, and what some models have of their own.

    `queue_items` is the most texts of a model that wait, for those that have a limit. Warm-up steps
    count when a model is loaded next.
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


class Watch(Message, frozen=True):
    """Whoever sends this is told of every batch from now on."""


class Hello(Message, frozen=True):
    """First message of an engine; one that has just begun has no model yet."""

    protocol: int
    pid: int
    device: str
    torch: str
    models: list[ModelInfo]


class Models(Message, frozen=True):
    """The models of an engine have changed to these."""

    models: list[ModelInfo]


class Heartbeat(Message, frozen=True):
    """An engine lives; the state of its queue, by model where it differs.

    `quality` is the level in force for requests that leave it to the engine.
    """

    droppable: ClassVar[bool] = True

    queue_items: dict[str, int]
    queue_seconds: dict[str, float]
    oldest_age: dict[str, float]
    in_flight: dict[str, int]
    memory_bytes: int
    quality: QualityName


class LevelChanged(Message, frozen=True):
    """The quality level in force, as in `Heartbeat`, has changed to this one."""

    quality: QualityName


class SentAnswers(msgspec.Struct, frozen=True, array_like=True):
    """The columns of `Answers`."""

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
            FrameError: the columns do not fit together.
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
            raise FrameError("the columns of an answer are not of one length")
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
    """The answers of a request, and the seconds of its stages (the slowest text's).

    `quality` is what decided the budgets: a level, or the points given up.
    """

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
    """A message could not be handled: a load did not succeed, a request named an unknown model."""

    id: int
    message: str


class Done(Message, frozen=True):
    """A load or unload succeeded, or settings are in force."""

    id: int


class BatchRan(Message, frozen=True):
    """One batch ran; only those who watch are told.

    `checked` and `clipped` count the int8 states that were looked at since the last batch of the
    model, and those outside their calibrated range. `dropped` counts batches before it that were
    not told, because the receiver did not read.
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


ToEngine: TypeAlias = Classify | Cancel | Load | Unload | Watch | Configure
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
    | BatchRan
)

TO_ENGINE = decoder(ToEngine)
TO_FRONT = decoder(ToFrontend)


def pack(column: Array, dtype: str) -> bytes:
    """Encode a column as little-endian numbers of one kind."""
    return column.astype(dtype, copy=False).tobytes()


def unpack(data: bytes, dtype: str) -> Array:
    """Decode a column, which cannot be written to.

    Raises:
        FrameError: the bytes are not whole numbers of this kind.
    """
    kind = np.dtype(dtype)
    if len(data) % kind.itemsize:
        raise FrameError(f"{len(data)} bytes are not whole numbers of {kind.itemsize} bytes")
    return np.frombuffer(data, kind).astype(kind.newbyteorder("="), copy=False)
