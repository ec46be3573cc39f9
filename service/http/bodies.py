"""Read and validate the body of a request: first its size, then JSON, then fields."""

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
    """Read, parse and validate a JSON body.

    Args:
        request: request.
        schema: schema of the body.
        max_bytes: maximum size.
        default: value of an empty body; None: an empty body is invalid.

    Raises:
        ApiError: 413 the body is too large (raised early), 415 another media type, 400 not JSON,
            422 a field is unknown or invalid.
    """
    body = await read_json(request, max_bytes)
    if default is not None and not body:
        return default
    return parse(body, schema, max_values(state_of(request)))


async def read_json(request: Request, max_bytes: int) -> bytes:
    """Read a body whose media type is JSON.

    Raises:
        ApiError: 415 another media type, and as in `read_bytes`.
        ClientGoneError: the client closed its connection.
    """
    kind = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if kind != "application/json" and not kind.endswith("+json"):
        raise ApiError(415, "the body must be application/json", code="unsupported_media_type")
    return await read_bytes(request, max_bytes)


def travelled(headers: Iterable[tuple[bytes, bytes]]) -> int | None:
    """Return the declared size of a body in bytes; None: undeclared or compressed.

    Names in `headers` are in lower case.
    """
    size = None
    for name, value in headers:
        if name == b"content-length" and value.isdigit():
            size = int(value)
        elif name == b"content-encoding":
            return None
    return size


def describe_body(*schemas: type[BaseModel], required: bool = True) -> dict[str, Any]:
    """Return the OpenAPI entry for a body, one of `schemas`, that the route itself reads."""
    references = [{"$ref": f"#/components/schemas/{schema.__name__}"} for schema in schemas]
    one = references[0] if len(references) == 1 else {"oneOf": references}
    return {"requestBody": {"required": required, "content": {"application/json": {"schema": one}}}}


async def read_bytes(request: Request, max_bytes: int) -> bytes:
    """Read a body and decompress it; the limit applies to both sizes.

    Raises:
        ApiError: 413 the body is too large, 415 unknown encoding, 400 invalid compressed data, 408
            the body was not received in time.
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
    """Return the maximum number of JSON values of a body, which suffices for all valid requests."""
    return _VALUES + _VALUES_PER_ITEM * state.settings.max_batch_items


def parse(body: bytes, schema: type[Body], limit: int) -> Body:
    """Parse and validate a JSON object of at most `limit` values.

    Raises:
        ApiError: 400 not JSON, 413 too many values, 422 a field is unknown or invalid.
    """
    return validate(parse_object(body, limit), schema)


def parse_object(body: bytes, limit: int) -> dict[str, Any]:
    """Parse a JSON object of at most `limit` values.

    A parsed value takes up to 250 bytes of memory, and an invalid one more for its error, even if
    it is short in JSON. So the values are counted first.

    Raises:
        ApiError: 400 not JSON, 413 too many values, 422 not an object.
    """
    body = body.removeprefix(codecs.BOM_UTF8)
    end = _end_of(body, limit) if len(body) > 2 * limit else None
    read = body[:end]
    try:
        value = from_json(read, allow_inf_nan=False, allow_partial=end is not None)
    except ValueError as error:
        raise explain(read, str(error)) from None
    if end is not None:
        message = f"the body holds more than {limit} JSON values"
        raise ApiError(413, message, code="too_many_items")
    if not isinstance(value, dict):
        raise ApiError(422, "the body must be a JSON object", code="invalid_field")
    return value


def _end_of(text: bytes, limit: int) -> int | None:
    """Return the position in JSON text after `limit` values; None: it has no more.

    Each value but the first follows one of `,[{`.
    """
    tokens = islice(_STRING_OR_START.finditer(text), 3 * limit)
    starts = (token.end() for token in tokens if token.end() - token.start() == 1)
    return next(islice(starts, limit, None), None)


def validate(value: dict[str, Any], schema: type[Body]) -> Body:
    """Return an object as an instance of its schema.

    Raises:
        ApiError: 422 a field is unknown or invalid.
    """
    try:
        return schema.model_validate(value)
    except ValidationError as error:
        raise _field_error(error, schema, value) from None


def _field_error(
    error: ValidationError, schema: type[RequestBody], value: dict[str, Any]
) -> ApiError:
    details = error.errors(include_url=False, include_context=False, include_input=False)
    # A union reports an error per branch. The branch that the client meant got furthest.
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
    """Return the schema of the innermost object of a location."""
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
