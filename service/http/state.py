"""State that all routes of a frontend share: settings, models, engines, the hub."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
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
from service.pipeline.answering import Answering, Waiting
from service.pipeline.served_models import Models, ServedModel, UnknownModelError
from service.pipeline.shadow import Shadows
from service.settings import Settings

Answer = TypeVar("Answer")

SHORT_CHARACTERS = 2000
"""Up to this length, tokenization takes less time than to wake a thread."""
THREADS = 2


@dataclass
class State:
    """The state of a frontend, one per application."""

    settings: Settings
    models: Models
    engines: Engines
    hub: HubLink
    tracer: Tracer | None
    keys: KeyRing
    cache: AnswerCache | None = None
    """Answer cache; None: it is off."""
    tokenizing: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(THREADS, thread_name_prefix="tokenize")
    )

    admission: Admission = field(init=False)
    answering: Answering = field(init=False)
    jobs: JobStore = field(init=False)
    shadows: Shadows = field(init=False)
    on_settings: list[Callable[[Settings], None]] = field(default_factory=list)
    """Called with new settings before they are in force; each raises if it cannot apply them."""

    def configure(self, settings: Settings) -> None:
        """Apply new settings, which differ only in settings that need no restart.

        Raises:
            KeysError: a key is invalid.
            Exception: as in `on_settings`.
        """
        for apply in self.on_settings:
            apply(settings)
        self.keys.configure(settings.all_keys(), anonymous=settings.anonymous)
        self.admission.configure(settings)
        self.settings = settings

    def __post_init__(self) -> None:
        self.admission = Admission(self.settings, self.engines, self.hub.counts)
        self.answering = Answering(self.engines, self.tracer)
        self.jobs = JobStore(self.settings.state_dir)
        self.shadows = Shadows(self.hub.counts)

    def start_threads(self) -> None:
        """Start the threads now, because later the process may reach a limit of threads."""
        barrier = threading.Barrier(THREADS)
        for _ in range(THREADS):
            self.tokenizing.submit(barrier.wait)

    async def tokenize(
        self,
        model: ServedModel,
        texts: list[Text],
        deadline: float,
        indices: Sequence[int] | None = None,
        waiting: Waiting = nullcontext,
    ) -> list[Tokens]:
        """Tokenize texts and pairs, in threads unless they are short.

        Long requests are tokenized in steps, which alternate with those of other requests. After
        the deadline or a cancellation, no further step begins.

        Args:
            model: model whose tokenizer is used.
            texts: texts of one request.
            deadline: deadline on the monotonic clock.
            indices: positions of the texts in the request, for errors; None: 0, 1, 2, ...
            waiting: context in which this waits for the threads.

        Raises:
            ApiError: 504, the deadline passed; 500, the tokenizer fails at a text, which is named.
        """
        try:
            if sum(map(characters, texts)) <= SHORT_CHARACTERS:
                return model.encoder.encode(texts)
            loop = asyncio.get_running_loop()
            steps = model.encoder.steps(texts)
            tokenized: list[Tokens] = []
            async with waiting(), asyncio.timeout(deadline - time.monotonic()):
                while len(tokenized) < len(texts):
                    tokenized += await loop.run_in_executor(self.tokenizing, next, steps)
            return tokenized
        except TimeoutError:
            raise too_late() from None
        except TokenizerError as error:
            index = error.place or 0
            param = f"input[{index if indices is None else indices[index]}]"
            message = f"{param}: the tokenizer of {model.checkpoint.label} fails at it"
            raise ApiError(500, message, param, "item_failed") from None

    def model(self, spec: str | None, request_id: str | None = None) -> ServedModel:
        """Return the model that a request names; see `Models.get`.

        Raises:
            ApiError: 404, the model is unknown; 503, no model is served.
        """
        if spec is None and self.models.default is None:
            raise ApiError(503, "no model is served", code="no_model", retry_after=5)
        try:
            model = self.models.get(spec, request_id)
            if request_id is None or model is self.models.served.get(model.checkpoint.name):
                return model
            # After a restart, engines may load the candidate later than the served version.
            loaded = (model.checkpoint.name, model.checkpoint.version) in self.engines.models
            return model if loaded else self.models.get(spec)
        except UnknownModelError as error:
            raise ApiError(404, str(error), "model", "unknown_model") from None


def too_late() -> ApiError:
    """Return the error of a request whose deadline passed."""
    return ApiError(504, "the deadline passed before the answer was there", "timeout_ms")


async def from_hub(answer: Awaitable[Answer]) -> Answer:
    """Return the hub's answer.

    Raises:
        ApiError: 503, the hub does not answer; 500, the hub failed to answer.
    """
    try:
        return await answer
    except DisconnectedError:
        message = "the server's hub does not answer"
        raise ApiError(503, message, code="hub_down", retry_after=1) from None
    except HubError as error:
        raise ApiError(500, str(error)) from None


def state_of(request: Request) -> State:
    """Return the state of the app that serves this request."""
    state: State = request.app.state.shared
    return state
