"""Which requests are looked up among the answers that a frontend keeps."""

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
    """Look for kept answers to a request's texts; None: answers to such a request are not kept.

    That is one that gives tokens, one whose answers name heads, and one with a target, for which
    the engine's queue chooses the level.
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
