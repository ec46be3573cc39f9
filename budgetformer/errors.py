"""The exceptions of this package."""

from __future__ import annotations


class BudgetFormerError(Exception):
    """Base class of all exceptions of this package.

    Its message is always valid UTF-8, even if it contains file names that are not.
    """

    def __str__(self) -> str:
        return readable(super().__str__())


class CheckpointError(BudgetFormerError):
    """A checkpoint is incomplete, damaged or not a BudgetFormer."""


class DataError(BudgetFormerError):
    """A data file cannot be read, lacks a column or has an invalid value."""


class TrainingError(BudgetFormerError):
    """A training run cannot continue, or its saved state belongs to another run."""


class PolicyError(BudgetFormerError, ValueError):
    """The checkpoint has no such quality level or budget."""


class TokenizerError(BudgetFormerError):
    """A tokenizer cannot be read, or fails on the text with index `place`."""

    def __init__(self, message: str, place: int | None = None) -> None:
        super().__init__(message)
        self.place = place


class WorkerError(BudgetFormerError):
    """A worker process died."""


def readable(message: object) -> str:
    r"""Return a message as valid UTF-8; invalid bytes of file names are escaped, as `\udcff`."""
    return str(message).encode("utf-8", "backslashreplace").decode()


def one_line(message: object) -> str:
    """Collapse whitespace so that a message fits on one line, even if it quotes a file."""
    return " ".join(str(message).split())
