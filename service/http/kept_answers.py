"""Look up requests in the answer cache."""

from __future__ import annotations

from fastapi import Request
from opentelemetry import trace

from budgetformer.inference.texts import Texts
from budgetformer.tokenization import Text
from service.http.schemas import ClassifyRequest
from service.http.state import State
from service.pipeline.answer_cache import AnswerOptions, Lookup
from service.pipeline.served_models import ServedModel


def look_up(
    request: Request,
    state: State,
    body: ClassifyRequest,
    model: ServedModel,
    given: list[Text] | Texts,
    quality: str | float,
) -> Lookup | None:
    """Return the cached answers to the texts of a request; None: the request cannot use the cache.

    That is a request with tokens, with `return_heads`, or with `target_ms`, for which the engine
    chooses the quality.
    """
    cache = state.cache
    if cache is None or isinstance(given, Texts) or body.return_heads or body.target_ms is not None:
        return None
    level = state.engines.level if quality == "auto" else quality
    caller = request.state.caller.name if state.settings.answer_cache_per_key else ""
    options = AnswerOptions(level, body.heads, body.max_heads, caller)
    lookup = cache.look_up(model, options, given)
    hits, misses = len(given) - len(lookup.misses), len(lookup.misses)
    state.hub.counts.looked_up(model.checkpoint.name, model.checkpoint.version, hits, misses)
    span = trace.get_current_span()
    if span.is_recording():
        span.set_attribute("budgetformer.cache_hits", hits)
        span.set_attribute("budgetformer.cache_misses", misses)
    return lookup
