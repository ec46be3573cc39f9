"""What clients send and get, as the API documentation shows it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

_EXAMPLE_TEXT = "The striker scored twice as the home side won the final."


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class TextPair(_Request):
    """A text, and for pair models the second one."""

    text: str
    text_pair: str | None = None


Input = str | TextPair | Annotated[list[str | TextPair], Field(min_length=1)]
Points = Annotated[float, Field(ge=0, le=100)]


class ClassifyRequest(_Request):
    """What to classify, and how much it may cost."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"input": [_EXAMPLE_TEXT], "quality": "balanced"}]},
        use_attribute_docstrings=True,
    )

    input: Input
    """A text, or a list of them; an item is a string or {"text": ..., "text_pair": ...}."""
    model: str | None = None
    """`name` or `name:version`; by default the server's default model."""
    top_k: Annotated[int, Field(ge=1)] | None = None
    """Keep only the best k labels in `labels`."""
    threshold: Annotated[float, Field(ge=0, le=1)] | None = None
    """Drop labels scored below it from `labels`."""
    use_activation: bool = True
    """False puts raw logits into `probs`."""
    truncate: bool = True
    """False refuses a text over the model's length."""
    quality: Literal["auto", "fast", "balanced", "best"] | Points | None = None
    """Quality level, or the accuracy points that may be given up against the full budget."""
    max_heads: Annotated[int, Field(ge=0)] | None = None
    """Most heads per layer that f_o may choose."""
    heads: Annotated[int, Field(ge=0)] | None = None
    """Heads per layer, in place of f_o."""
    timeout_ms: Annotated[int, Field(ge=1)] | None = None
    """Milliseconds after which the answer is worthless."""
    return_heads: bool = False
    """Name the heads that were computed, by layer."""


class LabelScore(BaseModel):
    """A label and its score."""

    label: str
    score: float


class Heads(BaseModel):
    """Heads computed for an item, of all the network has.

    `budget` is the ladder step that answered.
    """

    used: int
    total: int
    budget: int
    per_layer: list[list[int]] | None = None


class Classification(BaseModel):
    """The answer for one item."""

    index: int
    label: str
    score: float
    probs: list[float]
    num_classes: int
    labels: list[LabelScore]
    heads: Heads
    macs: int
    dense_macs: int
    tokens: int
    truncated: bool
    quality: str | float


class ErrorBody(BaseModel):
    """What was wrong."""

    message: str
    type: str
    param: str | None
    code: str


class ErrorResponse(BaseModel):
    """Every answer that is no success."""

    error: ErrorBody


class FailedItem(BaseModel):
    """An item that failed alone."""

    index: int
    error: ErrorBody


class Usage(BaseModel):
    """Sums over the request."""

    prompt_tokens: int
    total_tokens: int
    heads_used: int
    heads_total: int


class ClassifyResponse(BaseModel):
    """The answers, in the order of the inputs."""

    id: str
    object: Literal["list"]
    created: int
    model: str
    data: list[Classification | FailedItem]
    usage: Usage


class TokenizeRequest(_Request):
    """What to tokenize."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"input": _EXAMPLE_TEXT}]})

    input: Input
    model: str | None = None


class TokenizedText(BaseModel):
    """Tokens of one text, special ones included."""

    index: int
    tokens: list[str]
    ids: list[int]
    count: int
    truncated: bool


class TokenizeResponse(BaseModel):
    """Tokens of every text."""

    model: str
    data: list[TokenizedText]
