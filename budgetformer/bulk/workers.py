"""Worker processes: each holds the checkpoint and computes with one thread.

One thread per process is how the server's engines use a CPU, too: small passes gain little from
more threads. Parent and worker speak MessagePack frames over the worker's stdin and stdout.
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
"""For each worker: one that it computes, one that waits, one that waits for its turn to go out."""

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
        """Return the precision that it computes in, once it has loaded."""
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
        with suppress(BrokenPipeError):  # what it died of, `_reply` tells
            _send(self._process.stdin, message)

    def _reply(self) -> _Reply:
        assert self._process.stdout is not None
        frame = _receive(self._process.stdout)
        if frame is None:
            raise WorkerError(f"a worker ended with code {self._process.wait()}")
        reply: _Reply = msgspec.msgpack.decode(frame, type=_Reply)
        if isinstance(reply, _Failed):
            raise _ERRORS.get(reply.kind, WorkerError)(reply.message)
        return reply


class Workers:
    """Some workers; enter it to start them, leave it to end them."""

    def __init__(self, asked: Asked, count: int) -> None:
        self._asked = asked
        self._count = count
        self._all: list[_Worker] = []
        self._free: SimpleQueue[_Worker] = SimpleQueue()

    def __enter__(self) -> Self:
        """Start them: the first settles the precision, so that all answer alike.

        Raises:
            CheckpointError, PolicyError: of the first worker.
            WorkerError: one died.
        """
        try:
            self._start(self._asked)
            agreed = msgspec.structs.replace(self._asked, precision=self._all[0].ready())
            for _ in range(self._count - 1):
                self._start(agreed)
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
        """Answer chunks in their order, a bounded number of them at a time."""
        pool = ThreadPoolExecutor(self._count)
        try:
            yield from answer_in_order(
                chunks,
                lambda chunk: pool.submit(self._answer, chunk),
                CHUNKS_IN_FLIGHT * self._count,
            )
        except BaseException:
            self.__exit__()  # what is being computed is not wanted any more
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
            self._free.put(worker)  # a dead one, too: it fails the chunks that wait for a worker


def main() -> None:
    """Answer chunks from stdin until it ends; Ctrl-C is the parent's business."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Frames alone go to the parent, whatever a library prints.
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    given = sys.stdin.buffer
    first = _receive(given)
    if first is None:
        return
    import torch

    torch.set_num_threads(1)
    try:
        answerer = Answerer(msgspec.msgpack.decode(first, type=Asked))
        _send(replies, _Ready(answerer.precision))
        while (frame := _receive(given)) is not None:
            _send(replies, _Done(answerer.answer(msgspec.msgpack.decode(frame, type=Chunk))))
    except BudgetFormerError as error:
        _send(replies, _Failed(type(error).__name__, str(error)))
    except BrokenPipeError:
        os._exit(0)  # the parent is gone, and nothing that is still buffered can reach it


if __name__ == "__main__":
    main()
