"""Explain why a body is not valid JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, NoReturn

from service.http.errors import ApiError


def explain(body: bytes, reason: str) -> ApiError:
    """Return the error of a body that is not JSON.

    A string that is not Unicode is named by its place, such as `input[1]`.

    Args:
        body: that was refused.
        reason: what the parser says.
    """
    encoding = json.detect_encoding(body) if body else "utf-8"
    if encoding != "utf-8":
        return _error(f"it is {encoding.upper()}, and JSON is sent as UTF-8")
    try:
        # Python's parser accepts strings that are not Unicode, so that they can be located.
        value = json.loads(body.decode(errors="surrogateescape"), parse_constant=_refuse)
        strings = list(_strings(value))
    except _ConstantError as error:
        return _error(f"{error} is not a JSON number")
    except (ValueError, RecursionError):
        return _error(reason)
    for place, text in strings:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            escaped = 0xDC80 <= ord(text[error.start]) <= 0xDCFF and b"\\u" not in body
            what = "is not UTF-8" if escaped else "holds a lone surrogate, half of a character"
            return _error(f"{place or 'a name'} {what}", place)
    return _error(reason)


def _error(reason: str, param: str | None = None) -> ApiError:
    return ApiError(400, f"the body is not valid JSON: {reason}", param, "invalid_json")


class _ConstantError(Exception):
    """NaN or an infinity, which Python's parser accepts."""


def _refuse(name: str) -> NoReturn:
    raise _ConstantError(name)


def _strings(value: Any, place: str = "") -> Iterator[tuple[str | None, str]]:
    """Yield every string with its path; names of fields have the path None: they may hold texts."""
    if isinstance(value, str):
        yield place, value
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _strings(item, f"{place}[{index}]")
    elif isinstance(value, dict):
        for name, item in value.items():
            yield None, name
            yield from _strings(item, f"{place}.{name}" if place else name)
