"""The response to POST /classify in Infinity's format: the labels of each text, best first."""

from __future__ import annotations

import time

from fastapi import Response

from service.http.answers import Answered
from service.http.responses import json_response

NO_MODEL = "default/not-specified"
"""Model name that Infinity's client sends by default."""


def infinity_response(answered: Answered) -> Response:
    """Return the response in Infinity's format.

    Raises:
        ApiError: 500, an item failed.
    """
    answered.refuse_failures()
    return json_response(
        {
            "object": "classify",
            "data": answered.ranked("none" if answered.body.raw_scores else None),
            "model": answered.checkpoint.label,
            "usage": {"prompt_tokens": answered.tokens, "total_tokens": answered.tokens},
            "id": f"infinity-{answered.request_id}",
            "created": int(time.time()),
        }
    )
