"""The blocking client."""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
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


class Client:
    """Classify over HTTP with keep-alive connections.

    Use it as a context manager, or call `close`. Threads may share it.

    Args:
        url: URL of the server, such as "http://127.0.0.1:8000".
        api_key: API key, if the server requires one.
        timeout: maximum seconds of a call, including waits and retries; `math.inf`: no limit. The
            remaining time is sent to the server, which drops requests that would be late.
        retry: retry policy.
        batch_items, batch_characters: maximum texts and characters per request; longer lists are
            split. A server with a lower limit lowers `batch_items`.
        concurrency: maximum number of requests in flight.
        headers: headers of every request.
        http: httpx client to use; it is not closed. None: create one, which uses proxy variables
            unless the server is on this host.
        clock, sleep, chance: sources of time and randomness (0..1), for tests.
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
        http: httpx.Client | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
        chance: Callable[[], float] = random.random,
    ) -> None:
        self.timeout = timeout
        self.retry = retry
        self.limits = Limits(batch_items, batch_characters)
        self.concurrency = concurrency
        self._url = url.rstrip("/")
        self._headers = headers_of(headers, api_key)
        self._owned = http is None
        self._http, self._proxies = (http, []) if http else connect(httpx.Client, url, concurrency)
        self._pool = ThreadPoolExecutor(concurrency, thread_name_prefix="budgetformer-client")
        self._clock, self._sleep, self._chance = clock, sleep, chance

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._pool.shutdown(cancel_futures=True)
        if self._owned:
            self._http.close()

    def classify(
        self,
        texts: Text | Iterable[Text],
        *,
        timeout: float | None = None,
        progress: bool | Tell = False,
        **options: Unpack[Options],
    ) -> list[Result]:
        """Classify texts; return the results in the same order.

        Args:
            texts: one text or several.
            timeout: maximum seconds of this call; None: the client's `timeout`.
            progress: True shows a bar on stderr; a function is called with the numbers of answered
                and of all texts.
            options: fields of POST /classify.

        Raises:
            InputError: a text or an option cannot be sent; the message names it (`input[3]`).
            DeadlineExceededError: the time is over.
            OverloadedError, UnreachableError: retries did not help.
            ServerError: the server refused the request.
        """
        return list(self._stream(items_of(texts), timeout, progress, options))

    def stream(
        self,
        texts: Iterable[Text],
        *,
        timeout: float | None = None,
        progress: bool | Tell = False,
        **options: Unpack[Options],
    ) -> Iterator[Result]:
        """Classify texts from an iterator, with few of them in memory; yield results in order.

        Arguments and errors are those of `classify`. `timeout` starts with the first result that is
        requested from the returned iterator.
        """
        yield from self._stream(drawn(texts), timeout, progress, options)

    def _stream(
        self,
        items: Iterable[Item],
        timeout: float | None,
        progress: bool | Tell,
        options: Options,
    ) -> Iterator[Result]:
        check_options(options)
        budget = Budget.of(self._clock, self.timeout if timeout is None else timeout)
        call = Call(options, budget, self.retry, self._chance, self.limits, self._proxies)
        futures = (
            self._pool.submit(self._drive, call.attempts(chunk))
            for chunk in split(items, self.limits)
        )
        done = 0
        with progress_of(progress, size_of(items)) as tell:
            for results in self._in_order(futures):
                done += len(results)
                tell(done)
                yield from results

    def _in_order(self, futures: Iterator[Future[list[Result]]]) -> Iterator[list[Result]]:
        """Yield results in order, with enough requests started to keep all connections busy."""
        begun: deque[Future[list[Result]]] = deque()
        try:
            for future in futures:
                begun.append(future)
                if len(begun) == 2 * self.concurrency:
                    yield begun.popleft().result()
            while begun:
                yield begun.popleft().result()
        finally:
            for future in begun:
                future.cancel()

    def __call__(
        self,
        inputs: Text | Sequence[Text],
        *,
        function_to_apply: pipeline.Function | None = None,
        **options: Unpack[Options],
    ) -> pipeline.PipelineOutput:
        """Answer as `transformers.pipeline("text-classification")` does.

        Without `top_k`, each text gets its best label; with it a list of labels, all of them if it
        is None.

        Raises:
            ItemFailedError: a text failed.
            ClientError: see `classify`.
        """
        request_options = pipeline.request_options(function_to_apply, options)
        results = self.classify(inputs, **request_options)
        return pipeline.shaped(inputs, results, "top_k" in options, function_to_apply)

    def models(self) -> list[str]:
        """Return the names of the served models.

        Raises:
            UnreachableError: the server cannot be reached.
            ServerError: the server refused the request.
        """
        listed = self._request("GET", "/v1/models")
        return [model["id"] for model in listed["data"]]

    def model(self, name: str) -> dict[str, Any]:
        """Return a model's labels, sizes, and quality levels with their accuracy and cost.

        Raises:
            UnreachableError: the server cannot be reached.
            ServerError: the server refused the request.
        """
        return self._request("GET", f"/models/{name}")

    def submit_job(self, file: str | Path, **options: Unpack[JobOptions]) -> dict[str, Any]:
        """Submit a file of texts, or the URL of one, as a background job; return the job.

        The request is not retried.

        Raises:
            InputError: there is no such file, or it is neither CSV, JSONL nor Parquet.
            OverloadedError: the server has no room for the job.
            UnreachableError: the server cannot be reached.
            ServerError: the server refused the request.
        """
        submission = Submission.of(file, options)
        content = None if submission.path is None else submission.parts()
        return self._request(
            "POST", "/jobs", content=content, json=submission.json,
            params=submission.params, headers=submission.headers,
        )  # fmt: skip

    def jobs(self) -> list[dict[str, Any]]:
        """Return the jobs of this API key, newest first.

        Raises:
            UnreachableError: the server cannot be reached.
            ServerError: the server refused the request.
        """
        return list(self._request("GET", "/jobs")["data"])

    def job(self, job_id: str) -> dict[str, Any]:
        """Return the status and the progress of a job.

        Raises:
            UnreachableError: the server cannot be reached.
            ServerError: there is no such job.
        """
        return self._request("GET", f"/jobs/{job_id}")

    def cancel_job(self, job_id: str) -> dict[str, Any]:
        """Cancel a job if it has not ended, and delete its files.

        Raises:
            UnreachableError: the server cannot be reached.
            ServerError: there is no such job.
        """
        return self._request("DELETE", f"/jobs/{job_id}")

    def follow_job(self, job_id: str, tell: TellJob = lambda _: None) -> dict[str, Any]:
        """Wait until a job has ended, also over a restart of the server; return the job.

        Raises:
            OverloadedError, UnreachableError: the server has not answered for a minute.
            ServerError: the job no longer exists.
        """
        seen = self._clock()
        while True:
            try:
                job = self.job(job_id)
            except (OverloadedError, UnreachableError):
                if self._clock() - seen > LOST_SECONDS:
                    raise
            else:
                seen = self._clock()
                tell(job)
                if job["status"] in FINAL_STATES:
                    return job
            self._sleep(POLL_SECONDS)

    def save_job_result(self, job_id: str, output: Path) -> None:
        """Write the result of a finished job to a file, completely or not at all.

        Raises:
            UnreachableError: the server cannot be reached, or the connection broke.
            ServerError: there is no such job, or it has not finished.
            OSError: the file cannot be written.
        """
        part, url = unfinished(output), f"{self._url}/jobs/{job_id}/result"
        try:
            with self._http.stream("GET", url, headers=self._headers, timeout=PATIENCE) as response:
                if not response.is_success:
                    response.read()
                    raise read_error(response, 0, self._proxies)
                with part.open("wb") as file:
                    file.writelines(response.iter_bytes())
            part.replace(output)
        except httpx.TransportError as error:
            raise unreachable(error, self._proxies) from error
        finally:
            part.unlink(missing_ok=True)

    def _request(self, method: str, path: str, **request: Any) -> dict[str, Any]:
        headers = {**self._headers, **request.pop("headers", {})}
        try:
            response = self._http.request(
                method, self._url + path, headers=headers, timeout=PATIENCE, **request
            )
        except httpx.TransportError as error:
            raise unreachable(error, self._proxies) from error
        return read_body(response, self._proxies)

    def _drive(self, steps: Attempts) -> list[Result]:
        outcome: Outcome = None
        while True:
            try:
                step = steps.send(outcome)
            except StopIteration as end:
                return list(end.value)
            outcome = self._do(step)

    def _do(self, step: Send | Wait) -> Outcome:
        if isinstance(step, Wait):
            self._sleep(step.seconds)
            return None
        try:
            return self._http.post(
                f"{self._url}/classify", json=step.body, headers=self._headers, timeout=step.timeout
            )
        except httpx.TransportError as error:
            return error
