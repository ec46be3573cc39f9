"""The errors that this package raises on purpose."""

from __future__ import annotations


class BudgetFormerError(Exception):
    """Base class: every error that is raised on purpose derives from it.

    Its message can always be written as UTF-8, whatever the names of files in it hold.
    """

    def __str__(self) -> str:
        return readable(super().__str__())


class CheckpointError(BudgetFormerError):
    """A checkpoint folder is incomplete, damaged or does not describe a BudgetFormer."""


class DataError(BudgetFormerError):
    """A data file cannot be read, or lacks a column, or holds a value that cannot be used."""


class TrainingError(BudgetFormerError):
    """A training run cannot go on, or its state belongs to another run."""


class PolicyError(BudgetFormerError, ValueError):
    """A quality level or a budget was asked for that the checkpoint does not offer."""


class TokenizerError(BudgetFormerError):
    """A tokenizer cannot be read, or fails at a text; `place` says at which of several."""

    def __init__(self, message: str, place: int | None = None) -> None:
        super().__init__(message)
        self.place = place


class WorkerError(BudgetFormerError):
    """A worker process died."""


def readable(told: object) -> str:
    r"""Return text with `\udcff` for a byte such as FF of a file's name, where it is not UTF-8."""
    return str(told).encode("utf-8", "backslashreplace").decode()


def one_line(told: object) -> str:
    """Collapse whitespace so that a message fits on one line, even if it quotes a file."""
    return " ".join(str(told).split())
