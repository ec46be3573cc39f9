"""Show or report the progress of a call."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

Tell = Callable[[int, int | None], None]
"""Called with the number of answered texts and the number of all texts (None: unknown)."""


@contextmanager
def progress_of(wanted: bool | Tell, total: int | None) -> Iterator[Callable[[int], None]]:
    """Yield a function to be called with the number of answered texts.

    Args:
        wanted: True shows a bar on stderr, False does nothing; a function is called.
        total: number of all texts; None: unknown.

    Raises:
        ImportError: a bar needs Rich, which is not installed.
    """
    if callable(wanted):
        tell = wanted
        yield lambda done: tell(done, total)
        return
    if not wanted:
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("classifying", total=total)
        yield lambda done: bar.update(task, completed=done)
