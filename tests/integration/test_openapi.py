"""docs/openapi.json is what the routes say of themselves."""

from __future__ import annotations

import json
from pathlib import Path

from service.http.openapi import document
from tests.support.serving import Service

FILE = Path(__file__).parents[2] / "docs" / "openapi.json"


def test_the_document_in_docs_is_that_of_the_routes() -> None:
    assert FILE.read_text() == document(), "`make openapi` writes it anew"


async def test_a_running_server_shows_the_same_document(fresh: Service) -> None:
    shown = (await fresh.client.get("/openapi.json")).json()
    assert shown == json.loads(FILE.read_text())
