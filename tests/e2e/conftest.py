from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.certificates import make_certificate
from tests.support.command_line import command
from tests.support.processes import Server, server
from tests.support.serving import ADMIN_KEY
from tests.support.stores import TOPICS, model_store

__all__ = ["command", "model_store"]


@pytest.fixture(scope="package")
def running(model_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Return a shared server with one engine and an admin key; tests must not change it."""
    folder = tmp_path_factory.mktemp("running")
    options = {"default_model": TOPICS, "admin_key": ADMIN_KEY, "log_level": "debug"}
    options["quality_floor"] = "balanced"  # a busy machine must not change answers
    with server(model_store, folder, engines=1, **options) as running:
        yield running


@pytest.fixture(scope="package")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a self-signed certificate, chain.pem, and its key.pem."""
    return make_certificate(tmp_path_factory.mktemp("certificate"))
