"""A real server conforms to its OpenAPI document, by all checks of Schemathesis."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from service.keys import Key, digest, key_line
from tests.support.mutation import INPUTS
from tests.support.processes import server
from tests.support.stores import TOPICS

CONFIG = Path(__file__).parent / "schemathesis.toml"


@pytest.mark.timeout(3600)
def test_the_server_conforms_to_its_openapi_document(model_store: Path, tmp_path: Path) -> None:
    secret = "for-this-test"
    keys = tmp_path / "keys.toml"
    kept = Key(sha256=digest(secret.encode()), scopes=frozenset({"classify", "admin"}))
    keys.write_text(key_line("all", kept))
    options = {"default_model": TOPICS, "keys_file": str(keys)}
    with server(model_store, tmp_path, engines=1, **options) as running:
        command = [
            sys.executable, "-m", "schemathesis.cli", "--config-file", str(CONFIG),
            "run", f"{running.url}/openapi.json",
            "--checks", "all", "--header", f"Authorization: Bearer {secret}",
            "--phases", "examples,coverage,fuzzing,stateful",
            "--max-examples", str(max(2, INPUTS // 1000)),
            "--continue-on-failure", "--no-color", "--generation-deterministic",
        ]  # fmt: skip
        done = subprocess.run(
            command, cwd=tmp_path, capture_output=True, text=True, stdin=subprocess.DEVNULL
        )
        assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
        assert running.process.poll() is None
