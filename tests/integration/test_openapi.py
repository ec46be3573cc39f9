"""docs/openapi.json is the OpenAPI document of the routes."""

from __future__ import annotations

import json
from pathlib import Path

from service.http.openapi import document
from tests.support.serving import Service

FILE = Path(__file__).parents[2] / "docs" / "openapi.json"


def test_the_document_in_docs_is_up_to_date() -> None:
    assert FILE.read_text() == document(), "`make openapi` writes it again"


async def test_a_running_server_serves_the_same_document(fresh: Service) -> None:
    served = (await fresh.client.get("/openapi.json")).json()
    assert served == json.loads(FILE.read_text())
