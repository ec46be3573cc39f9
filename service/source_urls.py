"""URLs that the server may read for a caller: those below the prefixes that an operator allows."""

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
"""Not in URLs, or read differently by different readers; `::` joins URLs for fsspec."""

Place = tuple[str, str, int | None, list[str]]
"""Scheme, host, port and the segments of the path."""


def split_url(url: str) -> Place:
    """Return the place that a URL names, in the one form in which places are compared.

    Raises:
        ValueError: it names a file of this machine, or readers may disagree about what it names.
    """
    found = _URL.fullmatch(url.partition("?")[0])
    if found is None or _NEVER.search(url):
        raise ValueError(f"{url!r} is no URL; one looks like s3://bucket/texts/day.parquet")
    scheme, host, port, path = found.groups()
    if scheme in _LOCAL:
        raise ValueError(f"{url!r} names something of the server itself")
    segments = [unquote(part) for part in (path or "/")[1:].split("/")]
    if not all(segments[:-1]) or any(re.search(r"^\.{1,2}$|[/\\%]", part) for part in segments):
        raise ValueError(f"{url!r} has a path that readers may understand differently")
    # Names of hosts are the same in any case, those of buckets may not be.
    name = host.lower() if scheme in _PORTS else host
    return scheme, name, int(port) if port else _PORTS.get(scheme), segments


def is_allowed(url: str, prefixes: Iterable[str]) -> bool:
    """Say whether a URL is below one of the prefixes, each of which ends with a segment of a path.

    Raises:
        ValueError: as `split_url` does.
    """
    *place, path = split_url(url)
    for prefix in prefixes:
        *allowed, folder = split_url(prefix)
        if not folder[-1]:
            del folder[-1]
        if place == allowed and path[: len(folder)] == folder:
            return True
    return False


def without_query(url: str) -> str:
    """Return a URL without its query, which may hold a signature."""
    return url.partition("?")[0]
