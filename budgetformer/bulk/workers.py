"""Worker processes, each with the checkpoint and one thread.

Like the server's engines, workers use one thread each, because small passes gain little from more.
Parent and workers exchange MessagePack frames over the workers' stdin and stdout.
"""

from __future__ import annotations

import os
import signal
import struct
import subprocess
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from queue import SimpleQueue
from typing import IO, Any, Self

import msgspec

from budgetformer.bulk.answerer import Answerer, Asked
from budgetformer.bulk.chunks import Answered, Chunk, answer_in_order
from budgetformer.errors import BudgetFormerError, CheckpointError, PolicyError, WorkerError
from budgetformer.inference.precision import Precision
from budgetformer.subprocesses import python_command

CHUNKS_IN_FLIGHT = 3
"""Chunks per worker: one being computed, one waiting for a worker, and one whose answers wait for
those of earlier chunks."""

_LENGTH = struct.Struct("<I")
_ERRORS = {kind.__name__: kind for kind in (CheckpointError, PolicyError)}


class _Ready(msgspec.Struct, frozen=True, tag=True):
    precision: Precision


class _Done(msgspec.Struct, frozen=True, tag=True):
    answered: Answered


class _Failed(msgspec.Struct, frozen=True, tag=True):
    kind: str
    message: str


_Reply = _Ready | _Done | _Failed


def _send(pipe: IO[bytes], message: Any) -> None:
    frame = msgspec.msgpack.encode(message)
    pipe.write(_LENGTH.pack(len(frame)) + frame)
    pipe.flush()


def _receive(pipe: IO[bytes]) -> bytes | None:
    """Return the next frame, or None at the end of the stream."""
    head = pipe.read(_LENGTH.size)
    if len(head) < _LENGTH.size:
        return None
    (length,) = _LENGTH.unpack(head)
    frame = pipe.read(length)
    return frame if len(frame) == length else None


class _Worker:
    def __init__(self, asked: Asked) -> None:
        alone = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        self._process = subprocess.Popen(
            python_command("-m", __name__),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | alone,
        )
        self._send(asked)

    def ready(self) -> Precision:
        """Wait until the worker has loaded the checkpoint; return its precision."""
        reply = self._reply()
        assert isinstance(reply, _Ready)
        return reply.precision

    def answer(self, chunk: Chunk) -> Answered:
        self._send(chunk)
        reply = self._reply()
        assert isinstance(reply, _Done)
        return reply.answered

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with suppress(OSError):
                pipe.close()

    def _send(self, message: Any) -> None:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # `_reply` raises the reason why the worker died
            _send(self._process.stdin, message)

    def _reply(self) -> _Reply:
        assert self._process.stdout is not None
        frame = _receive(self._process.stdout)
        if frame is None:
            raise WorkerError(f"a worker process ended with exit code {self._process.wait()}")
        reply: _Reply = msgspec.msgpack.decode(frame, type=_Reply)
        if isinstance(reply, _Failed):
            raise _ERRORS.get(reply.kind, WorkerError)(reply.message)
        return reply


class Workers:
    """A pool of workers, which run while the `with` block does."""

    def __init__(self, asked: Asked, count: int) -> None:
        self._asked = asked
        self._count = count
        self._all: list[_Worker] = []
        self._free: SimpleQueue[_Worker] = SimpleQueue()

    def __enter__(self) -> Self:
        """Start the workers; the first chooses the precision of all, so that their answers agree.

        Raises:
            CheckpointError: the checkpoint is damaged.
            PolicyError: the checkpoint does not offer the quality or the heads.
            WorkerError: a worker died.
        """
        try:
            self._start(self._asked)
            same_precision = msgspec.structs.replace(self._asked, precision=self._all[0].ready())
            for _ in range(self._count - 1):
                self._start(same_precision)
            for worker in self._all[1:]:
                worker.ready()
        except BaseException:
            self.__exit__()
            raise
        for worker in self._all:
            self._free.put(worker)
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._all:
            worker.kill()

    def answer(self, chunks: Iterable[Chunk]) -> Iterator[Answered]:
        """Answer chunks, a bounded number of them at a time; yield the answers in order."""
        pool = ThreadPoolExecutor(self._count)
        try:
            yield from answer_in_order(
                chunks,
                lambda chunk: pool.submit(self._answer, chunk),
                CHUNKS_IN_FLIGHT * self._count,
            )
        except BaseException:
            self.__exit__()  # pending answers are no longer needed
            raise
        finally:
            pool.shutdown()

    def _start(self, asked: Asked) -> None:
        self._all.append(_Worker(asked))

    def _answer(self, chunk: Chunk) -> Answered:
        worker = self._free.get()
        try:
            return worker.answer(chunk)
        finally:
            self._free.put(worker)  # also a dead one, so that waiting chunks fail and do not hang


def main() -> None:
    """Answer chunks from stdin until it ends; Ctrl-C is handled by the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Output of libraries goes to stderr, because the parent reads frames from stdout.
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    requests = sys.stdin.buffer
    first = _receive(requests)
    if first is None:
        return
    import torch

    torch.set_num_threads(1)
    try:
        answerer = Answerer(msgspec.msgpack.decode(first, type=Asked))
        _send(replies, _Ready(answerer.precision))
        while (frame := _receive(requests)) is not None:
            _send(replies, _Done(answerer.answer(msgspec.msgpack.decode(frame, type=Chunk))))
    except BudgetFormerError as error:
        _send(replies, _Failed(type(error).__name__, str(error)))
    except BrokenPipeError:
        os._exit(0)  # the parent has ended; a normal exit would try to flush its pipe


if __name__ == "__main__":
    main()
