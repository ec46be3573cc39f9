"""Schemas of requests and responses, from which the API documentation is generated."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from service.http.errors import ApiError, ErrorSchema

_EXAMPLE_TEXT = "The striker scored twice as the home side won the final."


class RequestBody(BaseModel):
    """Base of request bodies: no unknown fields, no conversions, and null means absent."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    hints: ClassVar[dict[str, str]] = {}
    """Messages by field that replace those of the schema."""
    nested: ClassVar[dict[str, type[BaseModel]]] = {}
    """Schema by field whose objects are validated with it."""

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, value: Any) -> Any:
        if not isinstance(value, dict) or None not in value.values():
            return value
        optional = {name for name, field in cls.model_fields.items() if not field.is_required()}
        return {k: v for k, v in value.items() if v is not None or k not in optional}

    @classmethod
    def __get_pydantic_json_schema__(
        cls, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        """Document that null means absent."""
        described = handler(schema)
        own = handler.resolve_ref_schema(described)
        for name, field in cls.model_fields.items():
            if not field.is_required():
                own["properties"][name] = _or_null(own["properties"][name])
        return described


def _or_null(schema: dict[str, Any]) -> dict[str, Any]:
    """Return the JSON schema of a field that may also be null."""
    if any(one.get("type") == "null" for one in schema.get("anyOf", ())):
        return schema
    about = ("title", "description", "default")
    kept = {key: value for key, value in schema.items() if key in about}
    kind = {key: value for key, value in schema.items() if key not in about}
    return {"anyOf": [*kind.pop("anyOf", ()), *([kind] if kind else ()), {"type": "null"}], **kept}


class TextPair(RequestBody):
    """A text, and the second text for models of pairs."""

    text: str
    text_pair: str | None = None


Input = str | TextPair | Annotated[list[str | TextPair], Field(min_length=1, fail_fast=True)]
Points = Annotated[float, Field(ge=0, le=100)]
Quality = Literal["auto", "fast", "balanced", "best"] | Points

Milliseconds = Annotated[int, Field(ge=1, le=2**53)]
Size = Annotated[int, Field(ge=0, le=2**53)]
Zero = Annotated[int, Field(ge=0, le=0)]
"""Not Literal[0], which accepts False."""


def _yes(value: bool) -> bool:
    if not value:
        raise ValueError("input should be true")
    return value


Yes = Annotated[bool, AfterValidator(_yes), Field(json_schema_extra={"const": True})]
"""Not Literal[True], which accepts 1."""

_QUALITY_HINT = "must be 'auto', 'fast', 'balanced', 'best' or a number 0..100"
_INPUT_HINT = 'must be a string, {"text": ..., "text_pair": ...}, or a list of these'


class ClassifyRequest(RequestBody):
    """Texts to classify, and limits of their cost."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"input": [_EXAMPLE_TEXT], "quality": "balanced"}]},
        use_attribute_docstrings=True,
    )
    hints = {"input": _INPUT_HINT, "quality": _QUALITY_HINT}
    nested = {"input": TextPair}

    input: Input
    """A text, or a list of them; an item is a string or {"text": ..., "text_pair": ...}."""
    model: str | None = None
    """`name` or `name:version`; by default the server's default model."""
    top_k: Annotated[int, Field(ge=1)] | None = None
    """Return only the best k labels in `labels`."""
    threshold: Annotated[float, Field(ge=0, le=1)] | None = None
    """Omit labels with a lower score from `labels`."""
    use_activation: bool | None = True
    """False: `probs` has raw logits."""
    truncate: bool = True
    """False: a text that exceeds the model's length is an error."""
    quality: Quality | None = None
    """Quality level, or the acceptable accuracy drop (percentage points) against full budget."""
    target_ms: Annotated[int, Field(ge=1)] | None = None
    """Target time in milliseconds; the server chooses the best quality that meets it."""
    max_heads: Annotated[int, Field(ge=0)] | None = None
    """Maximum number of heads per layer that f_o may choose."""
    heads: Annotated[int, Field(ge=0)] | None = None
    """Fixed number of heads per layer, instead of the decision of f_o."""
    timeout_ms: Milliseconds | None = None
    """Deadline in milliseconds."""
    return_heads: bool = False
    """Return the heads that the last step computed, by layer."""
    raw_scores: bool | None = None
    """Sent by Infinity's clients: the answer has Infinity's format; true: raw logits."""
    user: str | None = None
    """Sent by OpenAI's and vLLM's clients; ignored."""
    request_id: Annotated[str, Field(pattern=r"^[A-Za-z0-9._:-]{1,128}$")] | None = None
    """Sent by vLLM's clients; the `id` of the answer contains it."""
    priority: Zero = 0
    """Sent by vLLM's clients; all requests have the same priority."""
    add_special_tokens: Yes = True
    """Sent by vLLM's clients; the model needs its special tokens."""
    truncate_prompt_tokens: Literal[-1] | None = None
    """Sent by vLLM's clients; -1 truncates to the model's length, as `truncate` does."""


class JobOptions(RequestBody):
    """Options of a job."""

    model_config = ConfigDict(use_attribute_docstrings=True)
    hints = {"quality": _QUALITY_HINT, "format": "must be 'csv', 'jsonl' or 'parquet'"}

    model: str | None = None
    """`name` or `name:version`; by default the server's default model."""
    quality: Quality | None = None
    """Quality level, or the acceptable accuracy drop (percentage points) against full budget."""
    heads: Annotated[int, Field(ge=0)] | None = None
    """Fixed number of heads per layer, instead of the decision of f_o."""
    format: Literal["csv", "jsonl", "parquet"] | None = None
    """File format of the result; by default that of the input."""


class JobRequest(JobOptions):
    """URL of a file to classify, and the options of the job."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"source": "s3://bucket/texts/day.parquet"}]},
        use_attribute_docstrings=True,
    )

    source: str
    """URL of a .csv, .jsonl or .parquet file, under one of the server's `job_sources`."""


Sequence = str | TextPair | list[str]
"""An item of TEI: a text, or a list of a text and optionally its pair."""


class PipelineParameters(RequestBody):
    """Parameters of Hugging Face's clients for text classification."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    top_k: Annotated[int, Field(ge=1)] | None = None
    """Return only the best k labels."""
    function_to_apply: Literal["softmax", "sigmoid", "none"] | None = None
    """Activation for the scores; by default that of the model."""
    truncation: bool | None = None
    """False: a text that exceeds the model's length is an error."""


class PredictRequest(RequestBody):
    """Texts to classify, as TEI and Hugging Face's clients send them."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"inputs": _EXAMPLE_TEXT}]},
        use_attribute_docstrings=True,
    )
    hints = {
        "inputs": "must be a string, [text, text_pair], or a batch [[text], [text, text_pair]]",
        "quality": _QUALITY_HINT,
    }
    nested = {"inputs": TextPair, "parameters": PipelineParameters}

    inputs: str | TextPair | Annotated[list[Sequence], Field(min_length=1, fail_fast=True)]
    """A text, [text, text_pair], or a batch of [text] and [text, text_pair].

    With `parameters`, a list of strings is a batch.
    """
    truncate: bool | None = None
    """False: a text that exceeds the model's length is an error."""
    truncation_direction: Literal["left", "right", "Left", "Right"] | None = None
    """Side that is truncated; it must be that of the model's training."""
    raw_scores: bool | None = None
    """True: scores are raw logits."""
    parameters: PipelineParameters | None = None
    """Sent by Hugging Face's clients; if given, even as {}, the answer is a list of lists."""
    options: dict[str, Any] | None = None
    """Sent by older clients of Hugging Face; ignored."""
    model: str | None = None
    """`name` or `name:version`; by default the server's default model."""
    quality: Quality | None = None
    """As for POST /classify."""
    timeout_ms: Milliseconds | None = None
    """As for POST /classify."""


class PredictError(ErrorSchema):
    """An error in TEI's format."""

    error: str
    error_type: str

    @classmethod
    def content(cls, error: ApiError) -> dict[str, Any]:
        """Return an error in TEI's format."""
        special = {429: "overloaded", 503: "unhealthy"}
        usual = "validation" if error.status < 500 else "backend"
        return {"error": error.message, "error_type": special.get(error.status, usual)}


class LabelScore(BaseModel):
    """A label and its score."""

    label: str
    score: float


class Heads(BaseModel):
    """Number of heads that were computed for an item, and its ladder steps."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    used: int
    """Computed heads, summed over layers and steps."""
    total: int
    budget: Annotated[int, Field(examples=[8])]
    """Ladder step that gave the answer."""
    predicted: Annotated[int | None, Field(examples=[2])]
    """Step that f_o predicted; null if the layers decide for themselves."""
    steps: Annotated[list[int], Field(examples=[[0, 2, 8]])]
    """All steps that were run, in order; the last one gave the answer."""
    per_layer: list[list[int]] | None = None
    """Heads that the last step computed, by layer; only with `return_heads`."""


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
    """An error."""

    message: str
    type: str
    param: str | None
    code: str


class ErrorResponse(ErrorSchema):
    """An error response."""

    error: ErrorBody

    @classmethod
    def content(cls, error: ApiError) -> dict[str, Any]:
        """Return an error in our format."""
        return {"error": error.body()}


class FailedItem(BaseModel):
    """An item that failed; the others are answered."""

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


class InfinityUsage(BaseModel):
    """Sums over the request, in Infinity's format."""

    prompt_tokens: int
    total_tokens: int


class InfinityResponse(BaseModel):
    """The answer in Infinity's format: the labels of each text, best first."""

    id: str
    object: Literal["classify"]
    created: int
    model: str
    data: list[list[LabelScore]]
    usage: InfinityUsage


class TokenizeRequest(RequestBody):
    """Texts to tokenize."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"input": _EXAMPLE_TEXT}]})

    input: Input
    model: str | None = None


class TokenizedText(BaseModel):
    """Tokens of a text, including special tokens."""

    index: int
    tokens: list[str]
    ids: list[int]
    count: int
    truncated: bool


class TokenizeResponse(BaseModel):
    """Tokens of every text."""

    model: str
    data: list[TokenizedText]


class Parameters(RequestBody):
    """Base of parameters in the Open Inference Protocol; unknown parameters are ignored."""

    model_config = ConfigDict(extra="ignore", use_attribute_docstrings=True)


class TensorParameters(Parameters):
    """Parameters of an input tensor."""

    binary_data_size: Size | None = None
    """Size in bytes of the values after the JSON, instead of `data`."""


class InferInput(RequestBody):
    """A tensor of texts or of tokens.

    Texts are `text`, and for pair models `text_pair` ("": this item has none), as BYTES. Tokens are
    `input_ids`, and if there is padding `attention_mask`, for pairs `token_type_ids`, as integers.
    """

    nested = {"parameters": TensorParameters}

    name: str
    shape: Annotated[list[Size], Field(max_length=8)]
    datatype: Literal["BYTES", "INT32", "INT64"]
    data: list[Any] | None = None
    parameters: TensorParameters = TensorParameters()


class OutputParameters(Parameters):
    """Parameters of an output tensor."""

    binary_data: bool | None = None
    """Whether the values are returned as binary data after the JSON."""
    classification: Annotated[int, Field(ge=0)] = 0
    """For `probs`: number of best classes to return, as strings score:index:label."""


class InferOutput(RequestBody):
    """An output tensor to return."""

    nested = {"parameters": OutputParameters}

    name: str
    parameters: OutputParameters = OutputParameters()

    @property
    def top_classes(self) -> int:
        """Number of best classes to return; 0: the tensor itself is returned."""
        return self.parameters.classification

    def binary(self, default: bool) -> bool:
        """Return whether the values are returned as binary data."""
        return default if self.parameters.binary_data is None else self.parameters.binary_data


class InferParameters(Parameters):
    """Parameters of an inference request."""

    hints = {"quality": _QUALITY_HINT}

    quality: Quality | None = None
    """As for POST /classify."""
    max_heads: Annotated[int, Field(ge=0)] | None = None
    """As for POST /classify."""
    heads: Annotated[int, Field(ge=0)] | None = None
    """As for POST /classify."""
    truncate: bool = True
    """As for POST /classify."""
    timeout: Size = 0
    """Deadline in microseconds; 0: that of the server's settings."""
    priority: Zero = 0
    """Accepted for Triton's clients; all requests have the same priority."""
    binary_data_output: bool = False
    """Whether outputs are binary data by default."""


class InferRequest(RequestBody):
    """Texts or tokens to classify, as tensors."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "inputs": [
                        {
                            "name": "text",
                            "shape": [1, 1],
                            "datatype": "BYTES",
                            "data": [_EXAMPLE_TEXT],
                        }
                    ],
                    "outputs": [{"name": "label"}, {"name": "score"}],
                }
            ]
        }
    )

    nested = {"inputs": InferInput, "outputs": InferOutput}

    id: str = ""
    inputs: Annotated[list[InferInput], Field(min_length=1, fail_fast=True)]
    outputs: Annotated[list[InferOutput], Field(fail_fast=True)] = []
    parameters: dict[str, Any] = {}


class InferError(ErrorSchema):
    """An error in the protocol's format."""

    error: str

    @classmethod
    def content(cls, error: ApiError) -> dict[str, Any]:
        """Return an error in the protocol's format."""
        return {"error": error.message}


class IndexRequest(RequestBody):
    """Body of a listing of the repository."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"ready": True}]})

    ready: bool = False


class RepositoryRequest(RequestBody):
    """Body of a load or unload by Triton's clients."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"parameters": {}}]})

    parameters: dict[str, Any] = {}
