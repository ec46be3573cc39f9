"""How far a call has come, shown or told."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

Tell = Callable[[int, int | None], None]
"""Is called with how many texts are done, and of how many (None: not known)."""


@contextmanager
def progress_of(wanted: bool | Tell, total: int | None) -> Iterator[Callable[[int], None]]:
    """Show a bar on stderr (True), tell a function, or do nothing; call it with how many are done.

    Raises:
        ImportError: a bar is wanted and Rich is not there.
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
