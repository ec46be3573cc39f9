"""Run the command line in this process."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from service.cli import main


@dataclass(frozen=True)
class Outcome:
    """The exit code and the output of a command."""

    code: int
    out: str
    err: str

    def complaint(self, code: int = 1) -> str:
        """Return the only line of an expected error, and check its exit code; 2: wrong usage."""
        assert self.code == code, self
        assert self.out == ""
        line = self.err.removesuffix("\n")
        assert line
        assert "\n" not in line
        return line


@dataclass(frozen=True)
class CommandLine:
    """`budgetformer`, with the environment that a test sets."""

    monkeypatch: pytest.MonkeyPatch
    capsys: pytest.CaptureFixture[str]

    def __call__(self, *arguments: Any, stdin: str = "") -> Outcome:
        """Run one command."""
        self.monkeypatch.setattr(sys, "argv", ["budgetformer", *map(str, arguments)])
        stream = io.TextIOWrapper(io.BytesIO(stdin.encode()))
        self.monkeypatch.setattr(sys, "stdin", stream)
        self.capsys.readouterr()
        with pytest.raises(SystemExit) as ending:
            main()
        written = self.capsys.readouterr()
        code = ending.value.code
        return Outcome(code if isinstance(code, int) else 0, written.out, written.err)


@pytest.fixture
def command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[CommandLine]:
    """Return the command line, in an environment without settings, which is restored afterwards."""
    before = dict(os.environ)
    for name in [name for name in os.environ if name.upper().startswith("BUDGETFORMER_")]:
        del os.environ[name]
    yield CommandLine(monkeypatch, capsys)
    monkeypatch.undo()
    os.environ.clear()
    os.environ.update(before)
