"""Recognise proxy variables such as HTTP_PROXY, and URLs of this host, which need no proxy."""

from __future__ import annotations

import os
from ipaddress import ip_address
from urllib.parse import urlsplit

_VARIABLES = {"http_proxy", "https_proxy", "all_proxy", "no_proxy"}


def proxy_variables() -> list[str]:
    """Return the names of the proxy variables (in upper or lower case) that are not empty."""
    return sorted(
        name for name, value in os.environ.items() if value and name.lower() in _VARIABLES
    )


def is_loopback(url: str) -> bool:
    """Return whether a URL names this host, which a proxy would take for its own host."""
    try:
        host = (urlsplit(url).hostname or "").rstrip(".")
    except ValueError:
        return False
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False
