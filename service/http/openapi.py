"""The OpenAPI document: `python -m service.http.openapi FILE` writes it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from service.http.app import create_app
from service.ipc.engine_client import Engines
from service.settings import Settings


def document() -> str:
    """Return the OpenAPI document, which does not depend on the served models."""
    app = create_app(Settings.model_construct(), Engines([]), Path("hub"))
    return json.dumps(app.openapi(), indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(document())
