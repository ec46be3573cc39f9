"""Environment variables that begin like settings: which of them are, and which others set."""

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
"""What Kubernetes and Docker's links set for each port of another service: names and values."""
_LINK_NAME = re.compile(r"(.*_)?NAME")


def service_variables(environment: Mapping[str, str]) -> list[str]:
    """Return the variables that Kubernetes or Docker has set for a service whose name is ours.

    For a service called `budgetformer`, or `budgetformer-anything`, both describe its ports to
    other containers in variables that begin as our settings do. `BUDGETFORMER_PORT` is a setting
    unless it holds a URL, and so is `BUDGETFORMER_METRICS_PORT`.
    """
    ours = {name: name.upper().removeprefix(PREFIX) for name in environment if is_ours(name)}
    # Docker also copies the environment of the linked container, as NAME_ENV_VARIABLE.
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


def is_ours(name: str) -> bool:
    """Say whether a variable's name begins as those of settings do."""
    return name.upper().startswith(PREFIX)
