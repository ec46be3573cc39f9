"""What the routes share: settings, models, engines, the hub."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

from fastapi import Request
from opentelemetry.trace import Tracer

from budgetformer.errors import TokenizerError
from budgetformer.tokenization import Text, Tokens, characters
from service.http.admission import Admission
from service.http.errors import ApiError
from service.ipc.connection import DisconnectedError
from service.ipc.engine_client import Engines
from service.ipc.hub_client import HubError, HubLink
from service.job_store import JobStore
from service.keys import KeyRing
from service.pipeline.answer_cache import AnswerCache
from service.pipeline.answering import Answering
from service.pipeline.served_models import Models, ServedModel, UnknownModelError
from service.pipeline.shadow import Shadows
from service.settings import Settings

Answer = TypeVar("Answer")

SHORT_CHARACTERS = 2000
"""Tokenized sooner than a thread wakes up."""
THREADS = 2


@dataclass
class State:
    """The frontend's own state, one per app."""

    settings: Settings
    models: Models
    engines: Engines
    hub: HubLink
    tracer: Tracer | None
    keys: KeyRing
    cache: AnswerCache | None = None
    """Answers that this frontend keeps; None: it keeps none."""
    tokenizing: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(THREADS, thread_name_prefix="tokenize")
    )

    admission: Admission = field(init=False)
    answering: Answering = field(init=False)
    jobs: JobStore = field(init=False)
    shadows: Shadows = field(init=False)
    on_settings: list[Callable[[Settings], None]] = field(default_factory=list)
    """Told of settings before they are in force; each raises if it cannot go by them."""

    def configure(self, settings: Settings) -> None:
        """Go by settings of which only those that may change differ from the ones in force.

        Raises:
            KeysError: a key is none; so may what `on_settings` raises.
        """
        for follow in self.on_settings:
            follow(settings)
        self.keys.configure(settings.all_keys(), anonymous=settings.anonymous)
        self.admission.configure(settings)
        self.settings = settings

    def __post_init__(self) -> None:
        self.admission = Admission(self.settings, self.engines, self.hub.counts)
        self.answering = Answering(self.engines, self.tracer)
        self.jobs = JobStore(self.settings.state_dir)
        self.shadows = Shadows(self.hub.counts)

    def start_threads(self) -> None:
        """Start the threads now: later, when one is needed, there may be no room for it."""
        together = threading.Barrier(THREADS)
        for _ in range(THREADS):
            self.tokenizing.submit(together.wait)

    async def tokenize(
        self,
        model: ServedModel,
        texts: list[Text],
        deadline: float,
        places: Sequence[int] | None = None,
    ) -> list[Tokens]:
        """Tokenize texts and pairs, in threads unless they are short.

        Each step takes its turn among those of other requests. At the deadline, or when the caller
        is cancelled, no further step begins.

        Args:
            model: whose tokenizer reads them.
            texts: of one request.
            deadline: on the monotonic clock.
            places: of the texts in the request; None: it has no others.

        Raises:
            ApiError: 504, the deadline passed; 500, the tokenizer fails at a text, which is named.
        """
        try:
            if sum(map(characters, texts)) <= SHORT_CHARACTERS:
                return model.encoder.encode(texts)
            loop = asyncio.get_running_loop()
            steps = model.encoder.steps(texts)
            found: list[Tokens] = []
            async with asyncio.timeout(deadline - time.monotonic()):
                while len(found) < len(texts):
                    found += await loop.run_in_executor(self.tokenizing, next, steps)
            return found
        except TimeoutError:
            raise too_late() from None
        except TokenizerError as error:
            at = error.place or 0
            place = f"input[{at if places is None else places[at]}]"
            message = f"{place}: the tokenizer of {model.checkpoint.label} fails at it"
            raise ApiError(500, message, place, "item_failed") from None

    def model(self, spec: str | None, request_id: str | None = None) -> ServedModel:
        """Return the model that a request names; see `Models.get`.

        Raises:
            ApiError: 404 unknown; 503 none is served at all.
        """
        if spec is None and self.models.default is None:
            raise ApiError(503, "no model is served", code="no_model", retry_after=5)
        try:
            model = self.models.get(spec, request_id)
            if request_id is None or model is self.models.served.get(model.checkpoint.name):
                return model
            # After a restart engines may have the candidate later than the served version.
            loaded = (model.checkpoint.name, model.checkpoint.version) in self.engines.models
            return model if loaded else self.models.get(spec)
        except UnknownModelError as error:
            raise ApiError(404, str(error), "model", "unknown_model") from None


def too_late() -> ApiError:
    """Return the error of a request whose deadline passed."""
    return ApiError(504, "the deadline passed before the answer was there", "timeout_ms")


async def from_hub(asking: Awaitable[Answer]) -> Answer:
    """Return the hub's answer.

    Raises:
        ApiError: 503, it is not there or does not answer; 500, it failed at the question.
    """
    try:
        return await asking
    except DisconnectedError:
        message = "the server's hub does not answer"
        raise ApiError(503, message, code="hub_down", retry_after=1) from None
    except HubError as error:
        raise ApiError(500, str(error)) from None


def state_of(request: Request) -> State:
    """Return the state of the app that serves this request."""
    state: State = request.app.state.shared
    return state
