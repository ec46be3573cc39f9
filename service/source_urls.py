"""Check URLs that the server reads for a caller against the prefixes that an operator allows."""

from __future__ import annotations

import re
from collections.abc import Iterable
from urllib.parse import unquote

_PORTS = {"http": 80, "https": 443}
_LOCAL = {"file", "local", "memory"}
_URL = re.compile(
    r"([a-z][a-z0-9+.-]*)://([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(?::([0-9]{1,5}))?(/.*)?"
)
_NEVER = re.compile(r"[^!-~]|[\\\"<>^`{|}#]|::")
"""Characters that are invalid in URLs or that libraries interpret differently; `::` chains URLs in
fsspec."""

SplitUrl = tuple[str, str, int | None, list[str]]
"""Scheme, host, port and the segments of the path."""


def split_url(url: str) -> SplitUrl:
    """Split a URL into normalized parts that can be compared.

    Raises:
        ValueError: the URL names a file of this machine, or libraries may interpret it differently.
    """
    match = _URL.fullmatch(url.partition("?")[0])
    if match is None or _NEVER.search(url):
        raise ValueError(
            f"{url!r} is not a valid URL; a valid one looks like s3://bucket/texts/day.parquet"
        )
    scheme, host, port, path = match.groups()
    if scheme in _LOCAL:
        raise ValueError(f"{url!r} names a file of the server itself")
    segments = [unquote(part) for part in (path or "/")[1:].split("/")]
    if not all(segments[:-1]) or any(re.search(r"^\.{1,2}$|[/\\%]", part) for part in segments):
        raise ValueError(
            f"{url!r} has an ambiguous path; it must have no empty, `.` or `..` segment and no "
            "encoded slash, backslash or percent sign"
        )
    # Host names are not case-sensitive; bucket names may be.
    name = host.lower() if scheme in _PORTS else host
    return scheme, name, int(port) if port else _PORTS.get(scheme), segments


def is_allowed(url: str, prefixes: Iterable[str]) -> bool:
    """Return whether a URL is one of the prefixes, or below it by whole segments of the path.

    Raises:
        ValueError: see `split_url`.
    """
    *origin, path = split_url(url)
    for prefix in prefixes:
        *allowed_origin, folder = split_url(prefix)
        if not folder[-1]:
            del folder[-1]
        if origin == allowed_origin and path[: len(folder)] == folder:
            return True
    return False


def without_query(url: str) -> str:
    """Return a URL without its query, which may hold a signature."""
    return url.partition("?")[0]
