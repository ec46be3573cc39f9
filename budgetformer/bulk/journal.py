"""The journal of an unfinished run: the file `<output>.part`.

The first line has the model and the options; each further line is the answer to a row, in the order
of the rows. An incomplete last line is dropped, so a run that was interrupted at any time can be
resumed.
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
    """The answers of a run so far.

    Attributes:
        path: path of the journal.
        totals: sums over the answers so far.
    """

    def __init__(
        self,
        output: Path,
        checkpoint: Checkpoint,
        quality: str | float | None,
        heads: int | None,
        resume: bool,
    ) -> None:
        """Create a journal, or with `resume` continue the one that exists.

        Args:
            output: file to which the finished result will be written.
            checkpoint: checkpoint that answers.
            quality: quality level, or allowed accuracy drop in points.
            heads: fixed budget in heads.
            resume: continue an existing journal.

        Raises:
            DataError: an output or a journal exists and `resume` is False; the journal has another
                model or other options; or another run is writing it.
        """
        self.path = _part(output)
        if not resume:
            for path in (output, self.path):
                if path.exists():
                    raise DataError(f"{path}: exists; delete it, or continue with --resume")
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
        """Return whether the run that writes `output` has finished."""
        return output.exists() and not _part(output).exists()

    @property
    def rows(self) -> int:
        """Number of answers so far."""
        return self.totals.rows

    @property
    def precision(self) -> Precision:
        """Precision of the answers so far; "auto" if there are none."""
        return self._head.precision

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close the file, and delete it if it has no answer."""
        if not self._begun:
            self.path.unlink(missing_ok=True)
        self._file.close()

    def remaining(self, rows: Iterator[Row]) -> Iterator[Row]:
        """Yield the rows after those that have an answer.

        Raises:
            DataError: an answer belongs to another text than the row.
        """
        for number, answer in enumerate(self.answers(), 1):
            row = next(rows, None)
            if row != (answer["text"], answer.get("text_pair")):
                raise DataError(
                    f"{self.path}: row {number} is the answer to another text; "
                    "delete it to start from the beginning"
                )
        yield from rows

    def append(self, answered: Answered) -> None:
        """Write the answers to a chunk; after this returns, a kill of this process loses none."""
        if not self._begun:
            self._head = msgspec.structs.replace(self._head, precision=answered.precision)
            self._file.write(msgspec.json.encode(self._head) + b"\n")
            self._begun = True
        self._file.write(answered.lines)
        self._file.flush()
        self.totals.add(answered)

    def lines(self) -> Iterator[bytes]:
        """Yield the answers so far as lines of JSON."""
        with self.path.open("rb") as file:
            next(file, None)
            yield from file

    def answers(self) -> Iterator[dict[str, Any]]:
        """Yield the answers so far."""
        return map(msgspec.json.Decoder(dict[str, Any]).decode, self.lines())

    def remove(self) -> None:
        """Delete the file, after its answers were written to the output."""
        self.path.unlink()

    def _read(self) -> None:
        """Count the complete lines, and truncate the file after them."""
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
                    raise DataError(
                        f"{self.path}: this is no unfinished run; delete it, or write to another "
                        "output"
                    ) from error
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
                    f"{self.path}: was started with {field} {then}, but now it is {now}; "
                    "delete it to start from the beginning"
                )
        self._head = before


def _part(output: Path) -> Path:
    return output.with_name(f"{output.name}.part")
