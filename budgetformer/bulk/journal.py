"""The answers of a run that is not over: `<output>.part`.

Its first line says what was asked, each further one is the answer to a row, in the order of the
rows. Only whole lines count, so a run that was stopped at any moment can go on.
"""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import msgspec

from budgetformer.bulk.chunks import Answered, Totals
from budgetformer.checkpoint.manifest import WEIGHTS
from budgetformer.checkpoint.store import Checkpoint
from budgetformer.errors import DataError
from budgetformer.inference.precision import Precision
from budgetformer.tables import Row


class _Head(msgspec.Struct, frozen=True):
    model: str
    weights: str
    quality: str | float | None
    heads: int | None
    precision: Precision = "auto"


class Journal:
    """Answers on their way to `output`, computed in `precision`.

    Attributes:
        totals: what the answers that are there add up to.
    """

    def __init__(
        self,
        output: Path,
        checkpoint: Checkpoint,
        quality: str | float | None,
        heads: int | None,
        resume: bool,
    ) -> None:
        """Begin, or with `resume` go on, if there is something to go on with.

        Raises:
            DataError: there are answers already and `resume` is not asked for, or they were asked
                for in another way, or another run is writing them.
        """
        self.path = _part(output)
        if not resume:
            for path in (output, self.path):
                if path.exists():
                    raise DataError(f"{path}: exists; delete it, or go on with --resume")
        weights = checkpoint.manifest.files[WEIGHTS].sha256
        self._head = _Head(checkpoint.label, weights, quality, heads)
        self._begun = False
        self.totals = Totals()
        try:
            self._file = self.path.open("a+b")
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._file.close()
            raise DataError(f"{self.path}: another run is writing it") from error
        except OSError as error:
            raise DataError(f"{self.path}: {error.strerror or error}") from error
        try:
            self._read()
        except DataError:
            self._file.close()
            raise

    @staticmethod
    def is_finished(output: Path) -> bool:
        """Whether a run that was to write `output` has ended."""
        return output.exists() and not _part(output).exists()

    @property
    def rows(self) -> int:
        """Answers that are there."""
        return self.totals.rows

    @property
    def precision(self) -> Precision:
        """The precision of the answers so far; "auto" before there are any."""
        return self._head.precision

    def __enter__(self) -> Self:
        """Return the journal."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close the file; one without any answer is removed."""
        if not self._begun:
            self.path.unlink(missing_ok=True)
        self._file.close()

    def remaining(self, rows: Iterator[Row]) -> Iterator[Row]:
        """Drop from `rows` those that are answered, and yield the others.

        Raises:
            DataError: the rows are not those that were answered.
        """
        for number, answer in enumerate(self.answers(), 1):
            row = next(rows, None)
            if row != (answer["text"], answer.get("text_pair")):
                raise DataError(
                    f"{self.path}: row {number} is the answer to another text; "
                    "delete it to begin anew"
                )
        yield from rows

    def append(self, answered: Answered) -> None:
        """Keep some answers; once this returns, an end of this process loses none of them."""
        if not self._begun:
            self._head = msgspec.structs.replace(self._head, precision=answered.precision)
            self._file.write(msgspec.json.encode(self._head) + b"\n")
            self._begun = True
        self._file.write(answered.lines)
        self._file.flush()
        self.totals.add(answered)

    def lines(self) -> Iterator[bytes]:
        """Yield the answers so far, a line of JSON each."""
        with self.path.open("rb") as file:
            next(file, None)
            yield from file

    def answers(self) -> Iterator[dict[str, Any]]:
        """Yield the answers so far."""
        return map(msgspec.json.Decoder(dict[str, Any]).decode, self.lines())

    def remove(self) -> None:
        """Delete the file: its answers are where they should be."""
        self.path.unlink()

    def _read(self) -> None:
        """Count the whole lines and cut off what follows them."""
        self._file.seek(0)
        whole = 0
        decode = msgspec.json.Decoder(dict[str, Any]).decode
        for number, line in enumerate(self._file):
            if not line.endswith(b"\n"):
                break
            try:
                if number == 0:
                    self._compare(msgspec.json.decode(line, type=_Head))
                else:
                    self.totals.add_row(decode(line))
            except (msgspec.DecodeError, KeyError, TypeError) as error:
                if number == 0:
                    raise DataError(f"{self.path}: this is no unfinished run") from error
                break
            whole += len(line)
            self._begun = True
        self._file.truncate(whole)
        self._file.seek(whole)

    def _compare(self, before: _Head) -> None:
        for field in ("model", "weights", "quality", "heads"):
            then, now = getattr(before, field), getattr(self._head, field)
            if then != now:
                raise DataError(
                    f"{self.path}: was begun with {field} {then}, now it is {now}; "
                    "delete it to begin anew"
                )
        self._head = before


def _part(output: Path) -> Path:
    return output.with_name(f"{output.name}.part")
