"""`budgetformer keys`: create API keys."""

from __future__ import annotations

from typing import Annotated

import typer

from service.cli.terminal import err
from service.keys import check_keys, key_line, new_key

keys_app = typer.Typer(no_args_is_help=True, help="Create API keys for callers of a server.")


@keys_app.callback()
def _root() -> None:
    """Create API keys for callers of a server."""


@keys_app.command("new")
def make_key(
    name: Annotated[str, typer.Argument(help="Name of the key, as metrics and logs show it.")],
    scope: Annotated[
        list[str] | None,
        typer.Option(help="Scope: classify, jobs or admin; may be repeated. Default: classify."),
    ] = None,
    texts_per_second: Annotated[
        float | None,
        typer.Option(help="Maximum average number of texts per second. Default: no limit."),
    ] = None,
    burst: Annotated[
        int | None, typer.Option(help="Maximum texts in a burst. Default: one second's worth.")
    ] = None,
    max_requests: Annotated[
        int | None, typer.Option(help="Maximum number of concurrent requests. Default: no limit.")
    ] = None,
) -> None:
    """Create an API key.

    Prints its secret to stderr, this once only, and its key-file line to stdout.
    """
    limits = {
        "texts_per_second": texts_per_second, "burst": burst, "max_requests": max_requests,
    }  # fmt: skip
    secret, key_record = new_key(scope or ["classify"], **limits)
    check_keys({name: key_record})
    typer.echo(key_line(name, key_record))
    err.print("The secret of the key, shown only once:", style="dim")
    typer.echo(secret, err=True)
