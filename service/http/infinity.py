"""Infinity's answer to POST /classify: for each text, its labels best first."""

from __future__ import annotations

import time

from fastapi import Response

from service.http.answers import Activation, Answered
from service.http.responses import json_response

NO_MODEL = "default/not-specified"
"""What Infinity's client sends for a model when its user named none."""


def infinity_response(answered: Answered) -> Response:
    """Write the answer as Infinity does.

    Raises:
        ApiError: 500, an item failed.
    """
    activation: Activation | None = "none" if answered.body.raw_scores else None
    return json_response(
        {
            "object": "classify",
            "data": [
                answered.best_first(answered.activate(item, activation))
                for item in answered.whole()
            ],
            "model": answered.checkpoint.label,
            "usage": {"prompt_tokens": answered.tokens, "total_tokens": answered.tokens},
            "id": f"infinity-{answered.request_id}",
            "created": int(time.time()),
        }
    )
