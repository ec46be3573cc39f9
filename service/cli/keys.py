"""`budgetformer keys`: keys for callers of a server."""

from __future__ import annotations

from typing import Annotated

import typer

from service.cli.terminal import err
from service.keys import check_keys, key_line, new_key

keys_app = typer.Typer(no_args_is_help=True, help="Make keys for callers of a server.")


@keys_app.callback()
def _root() -> None:
    """Make keys for callers of a server."""


@keys_app.command("new")
def make_key(
    name: Annotated[str, typer.Argument(help="Name of the key, as metrics and logs show it.")],
    scope: Annotated[
        list[str] | None,
        typer.Option(help="What it opens: classify, jobs, admin; may be repeated; none: classify."),
    ] = None,
    texts_per_second: Annotated[
        float | None, typer.Option(help="Texts that it may ask for in the long run.")
    ] = None,
    burst: Annotated[
        int | None, typer.Option(help="Texts that it may ask for at once; none: a second's.")
    ] = None,
    max_requests: Annotated[
        int | None, typer.Option(help="Requests that it may have under way at once.")
    ] = None,
) -> None:
    """Make a key: it is shown once, on stderr; its line for the key file goes to stdout."""
    limits = {
        "texts_per_second": texts_per_second, "burst": burst, "max_requests": max_requests,
    }  # fmt: skip
    secret, key = new_key(scope or ["classify"], **limits)
    check_keys({name: key})
    typer.echo(key_line(name, key))
    err.print("The key, shown this once:", style="dim")
    typer.echo(secret, err=True)
