"""The inputs of POST /v2/models/{name}/infer: texts or tokens.

Shapes: B items, T tokens of the longest item.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from budgetformer.checkpoint.store import Checkpoint
from budgetformer.inference.texts import Texts, TokenColumns
from budgetformer.model.tfidf import Array
from service.http.errors import ApiError, shorten
from service.http.schemas import InferInput, TextPair
from service.http.tensors import read_integers, read_texts

TEXT, TEXT_PAIR = "text", "text_pair"
IDS, MASK, TYPES = "input_ids", "attention_mask", "token_type_ids"
INPUTS = {
    TEXT: ("BYTES",),
    TEXT_PAIR: ("BYTES",),
    IDS: ("INT64", "INT32"),
    MASK: ("INT64", "INT32"),
    TYPES: ("INT64", "INT32"),
}
"""Datatypes of each input; the model's metadata names the first one."""
TOKENS = (IDS, MASK, TYPES)


@dataclass(frozen=True)
class Inputs:
    """The items of a request.

    Attributes:
        texts: texts to tokenize; empty if the request has tokens.
        tokens: tokens of the items; None: the request has texts.
        shape: shape of an output with one value per item.
    """

    texts: list[str | TextPair]
    tokens: Texts | None
    shape: list[int]


def read_inputs(given: Sequence[InferInput], binary: memoryview, checkpoint: Checkpoint) -> Inputs:
    """Return the items of a request to a model.

    Args:
        given: input tensors.
        binary: data after the JSON: the values of tensors in binary form, in their order.
        checkpoint: checkpoint of the model.

    Raises:
        ApiError: 422, a tensor is unknown, missing or invalid, or does not match the others or the
            model; 400, a text is not UTF-8.
    """
    tensors = _named(given)
    sizes = [tensor.parameters.binary_data_size for tensor in given]
    ends = list(accumulate(size or 0 for size in sizes))
    blobs = {
        tensor.name: None if size is None else binary[end - size : end]
        for tensor, size, end in zip(given, sizes, ends, strict=True)
    }
    inputs = _read(tensors, blobs, checkpoint)
    if ends[-1] != len(binary):
        message = (
            f"{len(binary)} bytes follow the JSON, but the inputs' binary_data_size add up to "
            f"{ends[-1]}; the two must be equal"
        )
        raise ApiError(422, message, "inputs", "invalid_field")
    return inputs


def _read(
    tensors: dict[str, InferInput], blobs: dict[str, memoryview | None], checkpoint: Checkpoint
) -> Inputs:
    if len({name in TOKENS for name in tensors}) > 1:
        message = (
            f"the inputs {', '.join(tensors)} cannot be combined: send texts ({TEXT}, {TEXT_PAIR}) "
            f"or tokens ({', '.join(TOKENS)})"
        )
        raise ApiError(422, message, "inputs", "invalid_field")
    main = IDS if any(name in TOKENS for name in tensors) else TEXT
    if main not in tensors:
        raise ApiError(
            422, f"the required input {main!r} is missing; add it", "inputs", "missing_field"
        )
    if main == IDS:
        columns = {
            name: read_integers(name, tensor.datatype, tensor.shape, tensor.data, blobs[name])
            for name, tensor in tensors.items()
        }
        tokens = _tokens(columns[IDS], columns.get(MASK), columns.get(TYPES), checkpoint)
        return Inputs([], tokens, [len(tokens), 1])
    texts = {
        name: read_texts(name, tensor.shape, tensor.data, blobs[name])
        for name, tensor in tensors.items()
    }
    return Inputs(_items(texts[TEXT], texts.get(TEXT_PAIR)), None, tensors[TEXT].shape)


def _named(given: Sequence[InferInput]) -> dict[str, InferInput]:
    tensors: dict[str, InferInput] = {}
    for tensor in given:
        name = tensor.name
        if name not in INPUTS:
            message = f"unknown input {shorten(name)!r}; the inputs are {', '.join(INPUTS)}"
            raise ApiError(422, message, "inputs", "invalid_field")
        if name in tensors:
            message = f"input {name!r} is given twice; send it once"
            raise ApiError(422, message, "inputs", "invalid_field")
        if tensor.datatype not in INPUTS[name]:
            allowed = " or ".join(INPUTS[name])
            message = f"input {name!r} has the datatype {tensor.datatype}; it must be {allowed}"
            raise ApiError(422, message, name, "invalid_field")
        tensors[name] = tensor
    return tensors


def _items(texts: list[str], pairs: list[str] | None) -> list[str | TextPair]:
    if pairs is None:
        return list(texts)
    if len(pairs) != len(texts):
        message = (
            f"input {TEXT!r} has {len(texts)} elements, but {TEXT_PAIR!r} has {len(pairs)}; "
            "send one pair for each text"
        )
        raise ApiError(422, message, TEXT_PAIR, "invalid_shape")
    return [
        TextPair(text=text, text_pair=pair) if pair else text
        for text, pair in zip(texts, pairs, strict=True)
    ]


def _tokens(ids: Array, mask: Array | None, types: Array | None, checkpoint: Checkpoint) -> Texts:
    """Return the tokens of ids [B, T] that the mask keeps, after a check of all values."""
    width = ids.shape[1]
    limit, architecture = checkpoint.manifest.max_tokens, checkpoint.architecture
    if width > limit:
        message = (
            f"input {IDS!r} has rows of {width} tokens, but the model reads at most {limit}; "
            "shorten them, since token ids are not truncated"
        )
        raise ApiError(422, message, IDS, "text_too_long")
    for name, values, upper in (
        (IDS, ids, architecture.vocab_size),
        (MASK, mask, 2),
        (TYPES, types, architecture.type_vocab_size),
    ):
        if values is not None:
            _check(name, values, ids.shape, upper)
    kept = np.ones(ids.shape, bool) if mask is None else mask.astype(bool)
    lengths = kept.sum(-1, dtype=np.int32)
    gaps = (kept[:, 1:] & ~kept[:, :-1]).any(-1)
    for wrong, problem in (
        (gaps, "has a 1 after a 0; padding must follow the tokens"),
        (lengths == 0, "has no 1; an item needs at least one token"),
    ):
        if wrong.any():
            place = f"{MASK}[{wrong.argmax()}]"
            raise ApiError(422, f"{place} {problem}", place, "invalid_field")
    kinds = None if types is None else types[kept].astype(np.int32)
    if kinds is not None and not kinds.any():
        kinds = None
    columns = TokenColumns(ids[kept].astype(np.int32), lengths, kinds)
    return Texts(columns, columns)


def _check(name: str, values: Array, shape: tuple[int, ...], upper: int) -> None:
    """Check that a tensor has the shape of the ids, and values from 0 to `upper` - 1."""
    if values.shape != shape:
        message = (
            f"input {name!r} has the shape {list(values.shape)}, but {IDS!r} has {list(shape)}; "
            "the two must be equal"
        )
        raise ApiError(422, message, name, "invalid_shape")
    wrong = (values < 0) | (values >= upper)
    if wrong.any():
        row, column = divmod(int(wrong.argmax()), shape[1])
        place = f"{name}[{row}][{column}]"
        message = f"{place} must be from 0 to {upper - 1}"
        raise ApiError(422, message, place, "invalid_field")
