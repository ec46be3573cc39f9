"""`budgetformer serve` and `doctor`, whose options are the server's settings."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import structlog
import typer
from pydantic import ValidationError
from pydantic_settings import CliSettingsSource
from pydantic_settings import SettingsError as SourceError
from rich.table import Table
from rich.text import Text
from typer.core import CompletionItem, TyperCommand  # type: ignore[attr-defined]

from budgetformer.cost.table import read_tables
from budgetformer.subprocesses import python_command
from service.cli.terminal import FAILED, JsonOption, out
from service.environment import PREFIX, service_variables
from service.settings import (
    CONFIG_FILE,
    Settings,
    SettingsError,
    first_problem,
    refuse_unknown_environment,
)
from service.telemetry.logs import configure_logs

log = structlog.get_logger()


class SettingsCommand(TyperCommand):
    """A command with the fields of `Settings` as further options, for the shell's completion."""

    def shell_complete(self, ctx: Any, incomplete: str) -> list[CompletionItem]:
        """Return the options that begin with `incomplete`."""
        options = super().shell_complete(ctx, incomplete)
        flags = [f"--{name.replace('_', '-')}" for name in (*Settings.model_fields, CONFIG_FILE)]
        flags = [flag for flag in flags if incomplete and flag.startswith(incomplete)]
        return [*options, *map(CompletionItem, flags)]


def serve(context: typer.Context) -> None:
    """Serve the models of a store over HTTP; `serve --help` lists all options."""
    settings, print_config = read_serve_settings(context.args)
    if print_config:
        out.print_json(data=settings.printable())
        return
    settings.check_access()
    given, read = settings, functools.partial(_read_again, context.args, dict(os.environ))
    if settings.model is not None:
        settings = _with_classifier(settings, settings.model)
    if settings.cost_tables is not None:
        read_tables(settings.cost_tables)  # raises an error here instead of in every engine
    configure_logs(settings.log_level, settings.log_format)
    if ignored := service_variables(os.environ):
        # Kubernetes sets them for a service with our name, unless enableServiceLinks is false.
        log.warning("environment variables of other services ignored", variables=ignored)
    if settings.cluster:
        _run_on_cluster(settings)
        return
    from service.control.supervisor import supervise

    supervise(settings, given, read)


def _read_again(arguments: list[str], environment: dict[str, str]) -> Settings:
    """Read the settings from the same flags and environment variables, and the present file.

    The variables are set again for this, since the supervisor has removed them from its
    environment, which its child processes inherit.

    Raises:
        SettingsError: a setting is unknown or has an invalid value.
    """
    before = dict(os.environ)
    try:
        os.environ.update(environment)
        return read_serve_settings(arguments)[0]
    finally:
        for name in environment.keys() - before.keys():
            del os.environ[name]


def _with_classifier(settings: Settings, source: str) -> Settings:
    """Add a classifier to the store and make it the default model.

    A child process adds it, so that this process, the supervisor, does not load torch.
    """
    command = python_command("-m", "budgetformer", "models", "add", source, "--json")
    command += ["--model-store", str(settings.model_store)]
    result = subprocess.run(command, stdout=subprocess.PIPE, check=False)
    if result.returncode:
        raise typer.Exit(result.returncode)
    added = json.loads(result.stdout)
    label = f"{added['name']}:{added['version']}"
    change = {"models": [label, *settings.models]}
    return settings.model_copy(
        update=change | {"default_model": settings.default_model or added["name"]}
    )


def _run_on_cluster(settings: Settings) -> None:
    try:
        from service.cluster.application import run
    except ModuleNotFoundError as error:
        if error.name != "ray":
            raise
        message = "--cluster needs Ray: pip install 'budgetformer-serving[cluster]'"
        raise SettingsError(message) from None
    run(settings)


def doctor(context: typer.Context, as_json: JsonOption = False) -> None:
    """Check whether `serve` with the same options would run well here, and suggest changes."""
    settings, _ = read_serve_settings(context.args)
    from service.cli.startup_checks import examine

    findings = list(examine(settings))
    if as_json:
        out.print_json(data=[dataclasses.asdict(finding) for finding in findings])
    else:
        table = Table("check", "", "found", "what to change")
        for f in findings:
            style = {"ok": "green", "warn": "yellow", "fail": "red"}[f.state]
            table.add_row(f.check, Text(f.state, style), Text(f.found), Text(f.advice or ""))
        out.print(table)
    if any(finding.state == "fail" for finding in findings):
        raise typer.Exit(FAILED)


def read_serve_settings(arguments: list[str]) -> tuple[Settings, bool]:
    """Read the settings from flags, environment and file.

    Returns:
        The settings, and whether `--print-config` is given.

    Raises:
        SettingsError: a setting is unknown or has an invalid value.
    """
    arguments = list(arguments)
    print_config = "--print-config" in arguments
    if print_config:
        arguments.remove("--print-config")
    arguments = [part for a in arguments for part in _split_config(a)]
    if "--config" in arguments:
        index = arguments.index("--config")
        if index + 1 >= len(arguments):
            raise SettingsError("--config requires a file")
        os.environ[f"{PREFIX}{CONFIG_FILE.upper()}"] = arguments[index + 1]
        del arguments[index : index + 2]
    file = os.environ.get(f"{PREFIX}{CONFIG_FILE.upper()}")
    if file and not Path(file).is_file():
        raise SettingsError(f"{file}: no such file")
    refuse_unknown_environment()
    try:
        source = _flags()(args=arguments)
        return Settings(_cli_settings_source=source), print_config  # type: ignore[call-arg]
    except ValidationError as error:
        raise SettingsError(first_problem(error)) from error
    except (SourceError, ValueError) as error:
        raise SettingsError(str(error)) from error


@functools.cache
def _flags() -> CliSettingsSource[Any]:
    """Return the parser of the flags; it is cached, since creating it takes longer than parsing."""
    return CliSettingsSource(Settings)


def _split_config(argument: str) -> list[str]:
    name, equals, value = argument.partition("=")
    return [name, value] if equals and name == "--config" else [argument]
