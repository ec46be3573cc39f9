"""The command line `budgetformer`, with one module for each family of commands."""

from __future__ import annotations

import io
import json
import platform
import sys
from importlib.metadata import version as version_of

import typer

import budgetformer
from budgetformer.cores import limit_threads
from budgetformer.errors import BudgetFormerError, PolicyError, readable
from service.cli.classify import classify
from service.cli.jobs import jobs_app
from service.cli.keys import keys_app
from service.cli.models import models_app
from service.cli.serve import SettingsCommand, doctor, serve
from service.cli.simulation import simulate
from service.cli.terminal import FAILED, USAGE, JsonOption, print_error
from service.cli.timing import bench_app, tune
from service.cli.training import calibrate, evaluate, import_encoder, recalibrate, train
from service.settings import SettingsError
from service.telemetry.traces import TracingError

__all__ = ["app", "main"]

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=True,
    epilog="Exit codes: 0 success, 1 failure, 2 invalid usage or settings, 130 interrupted.",
)


@app.callback()
def _root() -> None:
    """Serve, train and use text classifiers that spend only the heads that a text needs."""


_open = {"allow_extra_args": True, "ignore_unknown_options": True}
app.command(cls=SettingsCommand, context_settings=_open, add_help_option=False)(serve)
app.command(cls=SettingsCommand, context_settings=_open)(doctor)
app.command(cls=SettingsCommand, context_settings=_open)(simulate)
for _command in (classify, train, calibrate, recalibrate, evaluate, tune):
    app.command()(_command)
app.command("import")(import_encoder)
app.add_typer(models_app, name="models")
app.add_typer(bench_app, name="bench")
app.add_typer(keys_app, name="keys")
app.add_typer(jobs_app, name="jobs")


@app.command()
def version(as_json: JsonOption = False) -> None:
    """Print the version."""
    if not as_json:
        typer.echo(budgetformer.__version__)
        return
    libraries = ("torch", "transformers", "tokenizers")
    versions = {
        "budgetformer": budgetformer.__version__,
        "python": platform.python_version(),
        **{name: version_of(name) for name in libraries},
    }
    typer.echo(json.dumps(versions))


def main() -> None:
    """Run the command line; print an expected error on one line, and exit with its code."""
    limit_threads()
    if isinstance(sys.stdout, io.TextIOWrapper):  # file names may hold bytes that are not UTF-8
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        app()
    except UnicodeEncodeError as error:
        # Paths are passed to libraries and other processes as UTF-8.
        print_error(f"budgetformer: {readable(error.object)}: a name that is not UTF-8; rename it")
        raise SystemExit(FAILED) from None
    except BudgetFormerError as error:
        print_error(f"budgetformer: {error}")
        invalid_usage = isinstance(error, (SettingsError, PolicyError, TracingError))
        raise SystemExit(USAGE if invalid_usage else FAILED) from None
