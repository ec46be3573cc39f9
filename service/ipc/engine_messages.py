"""What fronts and the hub say to an engine, and it to them; see `service.ipc.frames` for the form.

Token ids travel as raw little-endian int32.
"""

from __future__ import annotations

import array
import sys
from collections.abc import Sequence
from typing import ClassVar, TypeAlias

import msgspec
import numpy as np
import numpy.typing as npt

from budgetformer.inference.policy import QualityName
from service.ipc.frames import FrameError, Message, decoder

PROTOCOL = 6


class ItemTokens(msgspec.Struct, frozen=True, array_like=True):
    """One text: token ids and segment ids, int32 bytes; no segments means all 0.

    `whole` and `whole_segments` are what step 0 reads; no `whole` means that it reads `ids`.
    """

    ids: bytes
    segments: bytes = b""
    whole: bytes = b""
    whole_segments: bytes = b""

    @property
    def tokens(self) -> int:
        """Tokens that the encoder reads."""
        return len(self.ids) // ID_BYTES

    @property
    def exit_tokens(self) -> int:
        """Tokens that step 0 reads."""
        return len(self.whole or self.ids) // ID_BYTES


class Decisions(msgspec.Struct, frozen=True, array_like=True):
    """What a frontend has decided of some items: the step that each runs first, 1 or more.

    `s` holds f_o's verdicts, float32 bytes; `exit_logits` step 0's logits, one item after another,
    and is empty for a network without a step 0.
    """

    steps: list[int]
    s: bytes
    exit_logits: bytes = b""

    def part(self, places: Sequence[int]) -> Decisions:
        """Return those of the items at some places."""
        width = len(self.exit_logits) // len(self.steps)
        return Decisions(
            [self.steps[place] for place in places],
            _rows(self.s, ID_BYTES, places),
            _rows(self.exit_logits, width, places),
        )


class Classify(Message, frozen=True):
    """Classify some items with one model; `remaining` seconds until the answer is worthless.

    A quality of "auto" leaves the level to the engine; so does `target`, the seconds that the
    answer should take. `request_id` and the W3C `traceparent` name the request in logs and traces.
    `decisions` are the frontend's; None: the engine decides. `steps` are the ladder steps at which
    items begin that another engine decided and began.
    """

    id: int
    model: str
    version: int
    items: list[ItemTokens]
    quality: str | float
    remaining: float
    heads: int | None = None
    max_heads: int | None = None
    return_heads: bool = False
    target: float | None = None
    request_id: str = ""
    traceparent: str = ""
    steps: list[int] | None = None
    decisions: Decisions | None = None


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


class ItemAnswer(msgspec.Struct, frozen=True, array_like=True):
    """The answer for one item. `error` set: it failed alone and the other fields mean nothing.

    `predicted` is the step that f_o expected to answer, None where layers decide for themselves;
    `steps` are those that this engine ran, the last of which answered (`budget`).

    `next_step` set: it is not answered, as it needs this ladder step, which its engine does not
    compute; the other fields say what was spent on it until then.
    """

    logits: list[float] = []
    budget: int = 0
    predicted: int | None = None
    steps: list[int] = []
    heads: list[int] = []
    chosen: list[list[int]] | None = None
    macs: int = 0
    dense_macs: int = 0
    error: str = ""
    next_step: int = 0


class Answer(Message, frozen=True):
    """The answers of a request, and the seconds of its stages (the slowest item's).

    `quality` is what decided the budgets: a level, or the points given up.
    """

    id: int
    items: list[ItemAnswer]
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
    """A load or unload succeeded."""

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


ToEngine: TypeAlias = Classify | Cancel | Load | Unload | Watch
ToFront: TypeAlias = (
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
TO_FRONT = decoder(ToFront)

ID_BYTES = 4


def _rows(data: bytes, width: int, places: Sequence[int]) -> bytes:
    return b"".join([data[place * width : (place + 1) * width] for place in places])


def pack_ids(ids: Sequence[int]) -> bytes:
    """Encode token ids as little-endian int32."""
    packed = array.array("i", ids)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


def unpack_floats(data: bytes) -> npt.NDArray[np.float32]:
    """Decode little-endian float32 numbers.

    Raises:
        FrameError: the length is not a multiple of four.
    """
    if len(data) % ID_BYTES:
        raise FrameError("numbers are not whole float32 numbers")
    return np.frombuffer(data, "<f4").astype(np.float32)


def unpack_ids(data: bytes) -> array.array[int]:
    """Decode what `pack_ids` made.

    Raises:
        FrameError: the length is not a multiple of four.
    """
    if len(data) % ID_BYTES:
        raise FrameError("token ids are not whole int32 numbers")
    unpacked = array.array("i")
    unpacked.frombytes(data)
    if sys.byteorder == "big":
        unpacked.byteswap()
    return unpacked
