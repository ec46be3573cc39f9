"""Read a request's body: sizes first, then JSON, then fields."""

from __future__ import annotations

import asyncio
import codecs
import re
import zlib
from collections.abc import Iterable
from difflib import get_close_matches
from itertools import islice
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError
from pydantic_core import from_json

from service.http.errors import ApiError, ClientGoneError, shorten
from service.http.json_errors import explain
from service.http.schemas import RequestBody
from service.http.state import State, state_of

Body = TypeVar("Body", bound=RequestBody)

_WINDOW_BITS = {"gzip": 31, "deflate": 15}
_STRING_OR_START = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?|[,\[{]', re.DOTALL)
_VALUES, _VALUES_PER_ITEM = 1000, 8
_NAME_LENGTH = 64
_TELLING = ("extra_forbidden", "too_short")
_UNION_NOISE = ("str", "TextPair", "list[", "literal[", "float", "constrained-")


async def read_body(
    request: Request, schema: type[Body], max_bytes: int, default: Body | None = None
) -> Body:
    """Read, parse and validate a JSON body; an empty one is `default`, if there is a default.

    Raises:
        ApiError: 413 too many bytes (as soon as that is known), 415 another media type, 400 not
            JSON, 422 a field is unknown or wrong.
    """
    body = await read_json(request, max_bytes)
    if default is not None and not body:
        return default
    return parse(body, schema, max_values(state_of(request)))


async def read_json(request: Request, max_bytes: int) -> bytes:
    """Read a body that says that it is JSON.

    Raises:
        ApiError: 415 another media type, and as `read_bytes` does.
        ClientGoneError: the client closed its connection.
    """
    kind = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if kind != "application/json" and not kind.endswith("+json"):
        raise ApiError(415, "the body must be application/json", code="unsupported_media_type")
    return await read_bytes(request, max_bytes)


def travelled(headers: Iterable[tuple[bytes, bytes]]) -> int | None:
    """Return how many bytes a body says that it has; None: it does not say, or is compressed.

    `headers` have lower-case names.
    """
    size = None
    for name, value in headers:
        if name == b"content-length" and value.isdigit():
            size = int(value)
        elif name == b"content-encoding":
            return None
    return size


def describe_body(*schemas: type[BaseModel], required: bool = True) -> dict[str, Any]:
    """Return what OpenAPI says of a route that reads its body, one of `schemas`, for itself."""
    references = [{"$ref": f"#/components/schemas/{schema.__name__}"} for schema in schemas]
    one = references[0] if len(references) == 1 else {"oneOf": references}
    return {"requestBody": {"required": required, "content": {"application/json": {"schema": one}}}}


async def read_bytes(request: Request, max_bytes: int) -> bytes:
    """Read a body, which may be compressed; the limit holds for both of its sizes.

    Raises:
        ApiError: 413 too many bytes, 415 an unknown encoding, 400 not what its encoding says,
            408 it took too long to arrive.
        ClientGoneError: the client closed its connection.
    """
    encoding = request.headers.get("content-encoding", "identity").lower()
    if encoding != "identity" and encoding not in _WINDOW_BITS:
        known = ", ".join(_WINDOW_BITS)
        raise ApiError(415, f"the body may be encoded as {known}", code="unsupported_media_type")
    body = await _read(request, max_bytes)
    if encoding == "identity":
        return body
    unpacking = zlib.decompressobj(_WINDOW_BITS[encoding])
    try:
        unpacked = unpacking.decompress(body, max_bytes + 1)
    except zlib.error:
        unpacked = b""
    if len(unpacked) > max_bytes:
        raise _too_large(max_bytes)
    if not unpacking.eof or unpacking.unused_data:
        raise ApiError(400, f"the body is not what {encoding} makes", code="invalid_encoding")
    return unpacked


def _too_large(max_bytes: int) -> ApiError:
    return ApiError(413, f"the body is larger than {max_bytes} bytes", code="body_too_large")


async def _read(request: Request, max_bytes: int) -> bytes:
    refusal = _too_large(max_bytes)
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > max_bytes:
        raise refusal
    chunks = []
    state = state_of(request)
    seconds = state.settings.receive_seconds
    more = True
    with state.admission.body() as receive:
        try:
            async with asyncio.timeout(seconds):
                while more:
                    part = await request.receive()
                    if part["type"] == "http.disconnect":
                        raise ClientGoneError
                    chunk, more = part.get("body", b""), part.get("more_body", False)
                    if receive(len(chunk)) > max_bytes:
                        raise refusal
                    chunks.append(chunk)
        except TimeoutError:
            message = f"the body did not arrive in {seconds:g} s"
            raise ApiError(408, message, code="request_timeout") from None
    return b"".join(chunks)


def max_values(state: State) -> int:
    """Return how many JSON values a body may hold: enough for the items that a request may have."""
    return _VALUES + _VALUES_PER_ITEM * state.settings.max_batch_items


def parse(body: bytes, schema: type[Body], most: int) -> Body:
    """Parse and validate JSON of at most so many values.

    Raises:
        ApiError: 400 not JSON, 413 too many values, 422 a field is unknown or wrong.
    """
    return validate(parse_object(body, most), schema)


def parse_object(body: bytes, most: int) -> dict[str, Any]:
    """Parse JSON that is an object of at most so many values.

    A value takes up to 250 bytes of memory, and a wrong one more for its error, however short it
    is: so they are counted before they are made.

    Raises:
        ApiError: 400 not JSON, 413 too many values, 422 no object.
    """
    body = body.removeprefix(codecs.BOM_UTF8)
    end = _end_of(body, most) if len(body) > 2 * most else None
    read = body[:end]
    try:
        value = from_json(read, allow_inf_nan=False, allow_partial=end is not None)
    except ValueError as error:
        raise explain(read, str(error)) from None
    if end is not None:
        message = f"the body holds more than {most} JSON values"
        raise ApiError(413, message, code="too_many_items")
    if not isinstance(value, dict):
        raise ApiError(422, "the body must be a JSON object", code="invalid_field")
    return value


def _end_of(text: bytes, most: int) -> int | None:
    """Return where JSON text holds more than so many values; None: nowhere.

    Each value but the first follows one of `,[{`.
    """
    tokens = islice(_STRING_OR_START.finditer(text), 3 * most)
    starts = (token.end() for token in tokens if token.end() - token.start() == 1)
    return next(islice(starts, most, None), None)


def validate(value: dict[str, Any], schema: type[Body]) -> Body:
    """Check the fields of an object.

    Raises:
        ApiError: 422 a field is unknown or wrong.
    """
    try:
        return schema.model_validate(value)
    except ValidationError as error:
        raise _field_error(error, schema, value) from None


def _field_error(
    error: ValidationError, schema: type[RequestBody], value: dict[str, Any]
) -> ApiError:
    details = error.errors(include_url=False, include_context=False, include_input=False)
    # A union reports every branch that failed; what got furthest into the value is what the caller
    # meant.
    detail = max(details, key=lambda d: (d["type"] in _TELLING, len(_param(d["loc"]))))
    param = _param(detail["loc"])
    root = str(detail["loc"][0])
    if detail["type"] == "extra_forbidden":
        *outer, name = map(str, detail["loc"])
        param = shorten(f"{_param(detail['loc'][:-1])}.{name}" if outer else name)
        known = list(_innermost(schema, outer).model_fields)
        near = get_close_matches(name[:_NAME_LENGTH], known, 1, cutoff=0.5)
        hint = f"; did you mean {near[0]!r}?" if near else f"; known are {', '.join(known)}"
        return ApiError(422, f"unknown field {param!r}{hint}", param, "unknown_field")
    if detail["type"] == "missing" and root not in value:
        return ApiError(422, f"field {root!r} is required", root, "missing_field")
    if root in schema.hints and detail["type"] != "too_short":
        place = param if "[" in param else root
        return ApiError(422, f"field {place!r} {schema.hints[root]}", place, "invalid_field")
    message = detail["msg"][0].lower() + detail["msg"][1:]
    return ApiError(422, f"field {param!r}: {message}", param, "invalid_field")


def _innermost(schema: type[BaseModel], names: list[str]) -> type[BaseModel]:
    """Follow a location to the model that its last part was given to."""
    for name in names:
        if issubclass(schema, RequestBody):
            schema = schema.nested.get(name, schema)
    return schema


def _param(location: tuple[int | str, ...]) -> str:
    """Write a location as a path, `input[3].text`, without the names of union branches."""
    path = ""
    for part in location:
        if isinstance(part, int):
            path += f"[{part}]"
        elif not part.startswith(_UNION_NOISE):
            path += f".{part}" if path else part
    return path
