"""Self-signed certificates."""

from __future__ import annotations

import subprocess
from pathlib import Path

from tests.support.programs import program


def make_certificate(folder: Path) -> Path:
    """Write a self-signed certificate for this host, chain.pem, and its key.pem to a folder."""
    folder.mkdir(exist_ok=True)
    command = [
        program("openssl"), "req", "-x509", "-newkey", "ec", "-pkeyopt",
        "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2", "-subj", "/CN=127.0.0.1",
        "-keyout", "key.pem", "-out", "chain.pem", "-addext", "subjectAltName=IP:127.0.0.1",
    ]  # fmt: skip
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    return folder
