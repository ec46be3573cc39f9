"""Tell settings from other environment variables with the same prefix.

Kubernetes and Docker set such variables for a service whose name begins with `budgetformer`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

PREFIX = "BUDGETFORMER_"

_URL = re.compile(r"(tcp|udp|sctp)://\S+", re.IGNORECASE)
_ADDRESS = re.compile(r"[0-9a-fA-F.:%\[\]]+")
_NUMBER = re.compile(r"\d+")
_FORMS = (
    (re.compile(r"(.*_)?SERVICE_HOST"), _ADDRESS),
    (re.compile(r"(.*_)?SERVICE_PORT(_.+)?"), _NUMBER),
    (re.compile(r"(.*_)?PORT"), _URL),
    (re.compile(r"(.*_)?PORT_\d+_(TCP|UDP|SCTP)(_START|_END)?"), _URL),
    (re.compile(r"(.*_)?PORT_\d+_(TCP|UDP|SCTP)_PROTO"), re.compile("tcp|udp|sctp")),
    (re.compile(r"(.*_)?PORT_\d+_(TCP|UDP|SCTP)_PORT(_START|_END)?"), _NUMBER),
    (re.compile(r"(.*_)?PORT_\d+_(TCP|UDP|SCTP)_ADDR"), _ADDRESS),
)
"""Names and values of the variables that Kubernetes and Docker links set for each port of another
service."""
_LINK_NAME = re.compile(r"(.*_)?NAME")


def service_variables(environment: Mapping[str, str]) -> list[str]:
    """Return the variables that Kubernetes or Docker has set for a service with our name.

    For a service named `budgetformer` or `budgetformer-...`, both describe its ports to other
    containers in variables with the prefix of our settings. `BUDGETFORMER_PORT` and
    `BUDGETFORMER_METRICS_PORT` are settings unless they hold a URL.
    """
    ours = {name: name.upper().removeprefix(PREFIX) for name in environment if has_prefix(name)}
    # Docker also copies the environment of a linked container, as NAME_ENV_VARIABLE.
    linked = tuple(
        f"{short.removesuffix('NAME')}ENV_"
        for name, short in ours.items()
        if _LINK_NAME.fullmatch(short) and environment[name].startswith("/")
    )
    return sorted(
        name
        for name, short in ours.items()
        if short.startswith(linked)
        or f"{short.removesuffix('NAME')}ENV_" in linked
        or any(
            form.fullmatch(short) and value.fullmatch(environment[name]) for form, value in _FORMS
        )
    )


def has_prefix(name: str) -> bool:
    """Return whether a variable's name begins with the prefix of settings."""
    return name.upper().startswith(PREFIX)
