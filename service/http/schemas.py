"""What clients send and get, as the API documentation shows it."""

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
    """What fields must be, where the message that follows from the schema would not say it well."""
    nested: ClassVar[dict[str, type[BaseModel]]] = {}
    """Which model the objects in a field are of."""

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
    """Return the JSON schema of a field that may be null, too."""
    if any(one.get("type") == "null" for one in schema.get("anyOf", ())):
        return schema
    about = ("title", "description", "default")
    kept = {key: value for key, value in schema.items() if key in about}
    kind = {key: value for key, value in schema.items() if key not in about}
    return {"anyOf": [*kind.pop("anyOf", ()), *([kind] if kind else ()), {"type": "null"}], **kept}


class TextPair(RequestBody):
    """A text, and for pair models the second one."""

    text: str
    text_pair: str | None = None


Input = str | TextPair | Annotated[list[str | TextPair], Field(min_length=1, fail_fast=True)]
Points = Annotated[float, Field(ge=0, le=100)]
Quality = Literal["auto", "fast", "balanced", "best"] | Points

Milliseconds = Annotated[int, Field(ge=1, le=2**53)]
Size = Annotated[int, Field(ge=0, le=2**53)]
Zero = Annotated[int, Field(ge=0, le=0)]
"""Not Literal[0], which takes False for it."""


def _yes(value: bool) -> bool:
    if not value:
        raise ValueError("input should be true")
    return value


Yes = Annotated[bool, AfterValidator(_yes), Field(json_schema_extra={"const": True})]
"""Not Literal[True], which takes 1 for it."""

_QUALITY_HINT = "must be 'auto', 'fast', 'balanced', 'best' or a number 0..100"
_INPUT_HINT = 'must be a string, {"text": ..., "text_pair": ...}, or a list of these'


class ClassifyRequest(RequestBody):
    """What to classify, and how much it may cost."""

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
    """Keep only the best k labels in `labels`."""
    threshold: Annotated[float, Field(ge=0, le=1)] | None = None
    """Drop labels scored below it from `labels`."""
    use_activation: bool | None = True
    """False puts raw logits into `probs`."""
    truncate: bool = True
    """False refuses a text over the model's length."""
    quality: Quality | None = None
    """Quality level, or the accuracy points that may be given up against the full budget."""
    target_ms: Annotated[int, Field(ge=1)] | None = None
    """Milliseconds that the answer should take: the best quality that the load allows in them."""
    max_heads: Annotated[int, Field(ge=0)] | None = None
    """Most heads per layer that f_o may choose."""
    heads: Annotated[int, Field(ge=0)] | None = None
    """Heads per layer, in place of f_o."""
    timeout_ms: Milliseconds | None = None
    """Milliseconds after which the answer is worthless."""
    return_heads: bool = False
    """Name the heads that the last step computed, by layer; `steps` names what ran before it."""
    raw_scores: bool | None = None
    """Sent by Infinity's clients: if given, the answer has Infinity's shape; true: raw logits."""
    user: str | None = None
    """Sent by OpenAI's and vLLM's clients; nothing depends on it."""
    request_id: Annotated[str, Field(pattern=r"^[A-Za-z0-9._:-]{1,128}$")] | None = None
    """vLLM's way to name a request: the `id` of the answer is made of it."""
    priority: Zero = 0
    """Sent by vLLM's clients; there is one priority."""
    add_special_tokens: Yes = True
    """Sent by vLLM's clients; the model cannot do without its special tokens."""
    truncate_prompt_tokens: Literal[-1] | None = None
    """Sent by vLLM's clients; -1 cuts at the model's length, as `truncate` does."""


class JobOptions(RequestBody):
    """How a file is classified, and the kind of its result."""

    model_config = ConfigDict(use_attribute_docstrings=True)
    hints = {"quality": _QUALITY_HINT, "format": "must be 'csv', 'jsonl' or 'parquet'"}

    model: str | None = None
    """`name` or `name:version`; by default the server's default model."""
    quality: Quality | None = None
    """Quality level, or the accuracy points that may be given up against the full budget."""
    heads: Annotated[int, Field(ge=0)] | None = None
    """Heads per layer, in place of f_o."""
    format: Literal["csv", "jsonl", "parquet"] | None = None
    """Kind of the result; by default that of the input."""


class JobRequest(JobOptions):
    """A file elsewhere, and how to classify it."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"source": "s3://bucket/texts/day.parquet"}]},
        use_attribute_docstrings=True,
    )

    source: str
    """URL of a .csv, .jsonl or .parquet file, under one of the server's `job_sources`."""


Sequence = str | TextPair | list[str]
"""For TEI, a text; or a list of a text and maybe its pair."""


class PipelineParameters(RequestBody):
    """What Hugging Face's clients can ask of a text classification."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    top_k: Annotated[int, Field(ge=1)] | None = None
    """Keep only the best k labels."""
    function_to_apply: Literal["softmax", "sigmoid", "none"] | None = None
    """What makes scores of logits; by default what the model was trained with."""
    truncation: bool | None = None
    """False refuses a text over the model's length."""


class PredictRequest(RequestBody):
    """What to classify, as TEI and Hugging Face's clients say it."""

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
    """False refuses a text over the model's length."""
    truncation_direction: Literal["left", "right", "Left", "Right"] | None = None
    """The end that is cut off; it must be the one that the model was trained with."""
    raw_scores: bool | None = None
    """True: raw logits as scores."""
    parameters: PipelineParameters | None = None
    """Sent by Hugging Face's clients: if given, even by {}, the answer is a list of lists."""
    options: dict[str, Any] | None = None
    """Sent by older clients of Hugging Face; nothing depends on it."""
    model: str | None = None
    """`name` or `name:version`; by default the server's default model."""
    quality: Quality | None = None
    """As for POST /classify."""
    timeout_ms: Milliseconds | None = None
    """As for POST /classify."""


class PredictError(ErrorSchema):
    """TEI's shape of an error."""

    error: str
    error_type: str

    @classmethod
    def content(cls, error: ApiError) -> dict[str, Any]:
        """Write an error as TEI does."""
        special = {429: "overloaded", 503: "unhealthy"}
        usual = "validation" if error.status < 500 else "backend"
        return {"error": error.message, "error_type": special.get(error.status, usual)}


class LabelScore(BaseModel):
    """A label and its score."""

    label: str
    score: float


class Heads(BaseModel):
    """Heads computed for an item, of all the network has, and the ladder steps that it ran."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    used: int
    """Summed over layers and steps."""
    total: int
    budget: Annotated[int, Field(examples=[8])]
    """The ladder step that answered."""
    predicted: Annotated[int | None, Field(examples=[2])]
    """The step that f_o expected to answer; null where every layer decides for itself."""
    steps: Annotated[list[int], Field(examples=[[0, 2, 8]])]
    """All steps that ran, in order; the last one answered."""
    per_layer: list[list[int]] | None = None
    """With `return_heads`: the heads that the last step computed."""


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


class ErrorResponse(ErrorSchema):
    """Every answer that is no success."""

    error: ErrorBody

    @classmethod
    def content(cls, error: ApiError) -> dict[str, Any]:
        """Write an error in our own shape."""
        return {"error": error.body()}


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


class InfinityUsage(BaseModel):
    """Sums over the request, as Infinity gives them."""

    prompt_tokens: int
    total_tokens: int


class InfinityResponse(BaseModel):
    """The answer that Infinity's clients read: for each text, its labels best first."""

    id: str
    object: Literal["classify"]
    created: int
    model: str
    data: list[list[LabelScore]]
    usage: InfinityUsage


class TokenizeRequest(RequestBody):
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


class Parameters(RequestBody):
    """Base of parameters in the Open Inference Protocol: unknown ones are for other servers."""

    model_config = ConfigDict(extra="ignore", use_attribute_docstrings=True)


class TensorParameters(Parameters):
    """How a tensor's values are sent."""

    binary_data_size: Size | None = None
    """Bytes of this tensor after the JSON, in place of `data`."""


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
    """How a tensor's values are to be answered."""

    binary_data: bool | None = None
    """Whether they come as binary data after the JSON."""
    classification: Annotated[int, Field(ge=0)] = 0
    """For `probs`: so many best classes, each as the string score:index:label."""


class InferOutput(RequestBody):
    """A tensor that is wanted."""

    nested = {"parameters": OutputParameters}

    name: str
    parameters: OutputParameters = OutputParameters()

    @property
    def top_classes(self) -> int:
        """How many classes are to be named; 0: the tensor itself is wanted."""
        return self.parameters.classification

    def binary(self, default: bool) -> bool:
        """Say whether the values are to be binary."""
        return default if self.parameters.binary_data is None else self.parameters.binary_data


class InferParameters(Parameters):
    """What a request to infer may ask for beside its tensors."""

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
    """Microseconds after which the answer is worthless; 0: the server's own."""
    priority: Zero = 0
    """There is one priority."""
    binary_data_output: bool = False
    """Whether outputs come as binary data where they do not say it themselves."""


class InferRequest(RequestBody):
    """What to classify, as tensors."""

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
    """The protocol's shape of an error."""

    error: str

    @classmethod
    def content(cls, error: ApiError) -> dict[str, Any]:
        """Write an error as the protocol does."""
        return {"error": error.message}


class IndexRequest(RequestBody):
    """Which entries of the repository to list."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"ready": True}]})

    ready: bool = False


class RepositoryRequest(RequestBody):
    """What Triton's clients send to load and unload."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"parameters": {}}]})

    parameters: dict[str, Any] = {}
