"""Read a request's body: sizes first, then JSON, then fields."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError
from pydantic_core import from_json
from starlette.requests import ClientDisconnect

from service.api.errors import ApiError, ClientGoneError

Body = TypeVar("Body", bound=BaseModel)

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
    kind = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if kind != "application/json" and not kind.endswith("+json"):
        raise ApiError(415, "the body must be application/json", code="unsupported_media_type")
    body = await _read(request, max_bytes)
    return default if default is not None and not body else parse(body, schema)


def describe_body(schema: type[BaseModel], required: bool = True) -> dict[str, Any]:
    """Return what OpenAPI says of a route that reads its body with `read_body`."""
    reference = {"$ref": f"#/components/schemas/{schema.__name__}"}
    content = {"application/json": {"schema": reference}}
    return {"requestBody": {"required": required, "content": content}}


async def _read(request: Request, max_bytes: int) -> bytes:
    refusal = ApiError(413, f"the body is larger than {max_bytes} bytes", code="body_too_large")
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > max_bytes:
        raise refusal
    chunks = []
    size = 0
    try:
        async for chunk in request.stream():
            size += len(chunk)
            if size > max_bytes:
                raise refusal
            chunks.append(chunk)
    except ClientDisconnect:
        raise ClientGoneError from None
    return b"".join(chunks)


def parse(body: bytes, schema: type[Body]) -> Body:
    """Parse and validate JSON.

    Raises:
        ApiError: 400 not JSON, 422 a field is unknown or wrong.
    """
    try:
        value = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise ApiError(400, f"the body is not valid JSON: {error}", code="invalid_json") from None
    if not isinstance(value, dict):
        raise ApiError(422, "the body must be a JSON object", code="invalid_field")
    try:
        return schema.model_validate(value)
    except ValidationError as error:
        raise _field_error(error, schema, value) from None


def _field_error(
    error: ValidationError, schema: type[BaseModel], value: dict[str, Any]
) -> ApiError:
    details = error.errors(include_url=False, include_context=False, include_input=False)
    # A union reports every branch that failed; what got furthest into the value is what the caller
    # meant.
    detail = max(details, key=lambda d: (d["type"] in _TELLING, len(_param(d["loc"]))))
    param = _param(detail["loc"])
    if detail["type"] == "extra_forbidden":
        *outer, name = map(str, detail["loc"])
        param = f"{_param(detail['loc'][:-1])}.{name}" if outer else name
        known = list(schema.model_fields) if len(detail["loc"]) == 1 else ["text", "text_pair"]
        near = get_close_matches(name, known, 1, cutoff=0.5)
        hint = f"; did you mean {near[0]!r}?" if near else f"; known are {', '.join(known)}"
        return ApiError(422, f"unknown field {param!r}{hint}", param, "unknown_field")
    if param.startswith("input") and detail["type"] != "too_short":
        place = param if "[" in param else "input"
        if "input" not in value:
            return ApiError(422, "field 'input' is required", "input", "missing_field")
        text = 'must be a string, {"text": ..., "text_pair": ...}, or a list of these'
        return ApiError(422, f"field {place!r} {text}", place, "invalid_field")
    if param == "quality":
        text = "must be 'auto', 'fast', 'balanced', 'best' or a number 0..100"
        return ApiError(422, f"field 'quality' {text}", param, "invalid_field")
    message = detail["msg"][0].lower() + detail["msg"][1:]
    return ApiError(422, f"field {param!r}: {message}", param, "invalid_field")


def _param(location: tuple[int | str, ...]) -> str:
    """Write a location as a path, `input[3].text`, without the names of union branches."""
    path = ""
    for part in location:
        if isinstance(part, int):
            path += f"[{part}]"
        elif not part.startswith(_UNION_NOISE):
            path += f".{part}" if path else part
    return path
