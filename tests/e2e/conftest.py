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
    """Return a server with one engine and an admin key, for tests that leave it as it was."""
    folder = tmp_path_factory.mktemp("running")
    options = {"default_model": TOPICS, "admin_key": ADMIN_KEY, "log_level": "debug"}
    options["quality_floor"] = "balanced"  # a busy machine is not to change what is answered
    with server(model_store, folder, engines=1, **options) as it:
        yield it


@pytest.fixture(scope="package")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a certificate that signs itself, chain.pem, and its key.pem."""
    return make_certificate(tmp_path_factory.mktemp("certificate"))
