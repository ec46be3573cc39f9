"""The client for asyncio."""

from __future__ import annotations

import asyncio
import random
import time
from collections import deque
from collections.abc import (
    AsyncGenerator,
    Awaitable,
    Callable,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from contextlib import aclosing
from pathlib import Path
from types import TracebackType
from typing import Any, Unpack

import httpx

from budgetformer.client import pipeline
from budgetformer.client.calls import (
    DEFAULT_RETRY,
    PATIENCE,
    Attempts,
    Budget,
    Call,
    Item,
    Limits,
    Options,
    Outcome,
    Retry,
    Send,
    Text,
    Wait,
    check_options,
    connect,
    drawn,
    headers_of,
    items_of,
    read_body,
    read_error,
    size_of,
    split,
    unreachable,
)
from budgetformer.client.errors import OverloadedError, UnreachableError
from budgetformer.client.jobs import (
    FINAL_STATES,
    LOST_SECONDS,
    POLL_SECONDS,
    JobOptions,
    Submission,
    TellJob,
    unfinished,
)
from budgetformer.client.progress import Tell, progress_of
from budgetformer.client.results import Result


class AsyncClient:
    """Classify over HTTP with keep-alive connections.

    Use it as an asynchronous context manager, or call `close`. It belongs to one event loop.
    Its methods, arguments and errors are those of `Client`; `http` is an `httpx.AsyncClient`, and
    `sleep` a coroutine function.
    """

    def __init__(
        self,
        url: str = "http://127.0.0.1:8000",
        *,
        api_key: str | None = None,
        timeout: float = 60.0,
        retry: Retry = DEFAULT_RETRY,
        batch_items: int = 64,
        batch_characters: int = 500_000,
        concurrency: int = 4,
        headers: Mapping[str, str] | None = None,
        http: httpx.AsyncClient | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        chance: Callable[[], float] = random.random,
    ) -> None:
        self.timeout = timeout
        self.retry = retry
        self.limits = Limits(batch_items, batch_characters)
        self.concurrency = concurrency
        self._url = url.rstrip("/")
        self._headers = headers_of(headers, api_key)
        self._owned = http is None
        self._http, self._proxies = (
            (http, []) if http else connect(httpx.AsyncClient, url, concurrency)
        )
        self._room = asyncio.Semaphore(concurrency)
        self._clock, self._sleep, self._chance = clock, sleep, chance

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections."""
        if self._owned:
            await self._http.aclose()

    async def classify(
        self,
        texts: Text | Iterable[Text],
        *,
        timeout: float | None = None,
        progress: bool | Tell = False,
        **options: Unpack[Options],
    ) -> list[Result]:
        """Classify texts; return the results in the same order.

        Arguments and errors are those of `Client.classify`.
        """
        stream = self._stream(items_of(texts), timeout, progress, options)
        return [result async for result in stream]

    async def stream(
        self,
        texts: Iterable[Text],
        *,
        timeout: float | None = None,
        progress: bool | Tell = False,
        **options: Unpack[Options],
    ) -> AsyncGenerator[Result, None]:
        """Classify texts from an iterator, with few of them in memory; yield results in order."""
        async with aclosing(self._stream(drawn(texts), timeout, progress, options)) as stream:
            async for result in stream:
                yield result

    async def _stream(
        self,
        items: Iterable[Item],
        timeout: float | None,
        progress: bool | Tell,
        options: Options,
    ) -> AsyncGenerator[Result, None]:
        check_options(options)
        budget = Budget.of(self._clock, self.timeout if timeout is None else timeout)
        call = Call(options, budget, self.retry, self._chance, self.limits, self._proxies)
        tasks = (
            asyncio.create_task(self._drive(call.attempts(chunk)))
            for chunk in split(items, self.limits)
        )
        done = 0
        with progress_of(progress, size_of(items)) as tell:
            async with aclosing(self._in_order(tasks)) as answered:
                async for results in answered:
                    done += len(results)
                    tell(done)
                    for result in results:
                        yield result

    async def _in_order(
        self, tasks: Iterator[asyncio.Task[list[Result]]]
    ) -> AsyncGenerator[list[Result], None]:
        """Yield results in order, with enough requests started to keep all connections busy."""
        begun: deque[asyncio.Task[list[Result]]] = deque()
        try:
            for task in tasks:
                begun.append(task)
                if len(begun) == 2 * self.concurrency:
                    yield await begun.popleft()
            while begun:
                yield await begun.popleft()
        finally:
            for task in begun:
                task.cancel()
            await asyncio.gather(*begun, return_exceptions=True)

    async def __call__(
        self,
        inputs: Text | Sequence[Text],
        *,
        function_to_apply: pipeline.Function | None = None,
        **options: Unpack[Options],
    ) -> pipeline.PipelineOutput:
        """Answer as `transformers.pipeline("text-classification")` does."""
        request_options = pipeline.request_options(function_to_apply, options)
        results = await self.classify(inputs, **request_options)
        return pipeline.shaped(inputs, results, "top_k" in options, function_to_apply)

    async def models(self) -> list[str]:
        """Return the names of the served models."""
        listed = await self._request("GET", "/v1/models")
        return [model["id"] for model in listed["data"]]

    async def model(self, name: str) -> dict[str, Any]:
        """Return a model's labels, sizes, and quality levels with their accuracy and cost."""
        return await self._request("GET", f"/models/{name}")

    async def submit_job(self, file: str | Path, **options: Unpack[JobOptions]) -> dict[str, Any]:
        """Submit a file of texts, or the URL of one, as a background job; return the job."""
        submission = Submission.of(file, options)
        content = None if submission.path is None else _in_threads(submission.parts())
        return await self._request(
            "POST", "/jobs", content=content, json=submission.json,
            params=submission.params, headers=submission.headers,
        )  # fmt: skip

    async def jobs(self) -> list[dict[str, Any]]:
        """Return the jobs of this API key, newest first."""
        return list((await self._request("GET", "/jobs"))["data"])

    async def job(self, job_id: str) -> dict[str, Any]:
        """Return the status and the progress of a job."""
        return await self._request("GET", f"/jobs/{job_id}")

    async def cancel_job(self, job_id: str) -> dict[str, Any]:
        """Cancel a job if it has not ended, and delete its files."""
        return await self._request("DELETE", f"/jobs/{job_id}")

    async def follow_job(self, job_id: str, tell: TellJob = lambda _: None) -> dict[str, Any]:
        """Wait until a job has ended, also over a restart of the server; return the job."""
        seen = self._clock()
        while True:
            try:
                job = await self.job(job_id)
            except (OverloadedError, UnreachableError):
                if self._clock() - seen > LOST_SECONDS:
                    raise
            else:
                seen = self._clock()
                tell(job)
                if job["status"] in FINAL_STATES:
                    return job
            await self._sleep(POLL_SECONDS)

    async def save_job_result(self, job_id: str, output: Path) -> None:
        """Write the result of a finished job to a file, completely or not at all."""
        part, url = unfinished(output), f"{self._url}/jobs/{job_id}/result"
        try:
            async with self._http.stream(
                "GET", url, headers=self._headers, timeout=PATIENCE
            ) as response:
                if not response.is_success:
                    await response.aread()
                    raise read_error(response, 0, self._proxies)
                with part.open("wb") as file:
                    async for content in response.aiter_bytes():
                        await asyncio.to_thread(file.write, content)
            part.replace(output)
        except httpx.TransportError as error:
            raise unreachable(error, self._proxies) from error
        finally:
            part.unlink(missing_ok=True)

    async def _request(self, method: str, path: str, **request: Any) -> dict[str, Any]:
        headers = {**self._headers, **request.pop("headers", {})}
        try:
            response = await self._http.request(
                method, self._url + path, headers=headers, timeout=PATIENCE, **request
            )
        except httpx.TransportError as error:
            raise unreachable(error, self._proxies) from error
        return read_body(response, self._proxies)

    async def _drive(self, steps: Attempts) -> list[Result]:
        outcome: Outcome = None
        while True:
            try:
                step = steps.send(outcome)
            except StopIteration as end:
                return list(end.value)
            outcome = await self._do(step)

    async def _do(self, step: Send | Wait) -> Outcome:
        if isinstance(step, Wait):
            await self._sleep(step.seconds)
            return None
        try:
            async with self._room:
                return await self._http.post(
                    f"{self._url}/classify",
                    json=step.body,
                    headers=self._headers,
                    timeout=step.timeout,
                )
        except httpx.TransportError as error:
            return error


async def _in_threads(parts: Iterator[bytes]) -> AsyncGenerator[bytes, None]:
    """Yield the parts of a file, which a thread reads so that the event loop is not blocked."""
    while (part := await asyncio.to_thread(next, parts, None)) is not None:
        yield part
