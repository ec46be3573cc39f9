"""Random settings and mutated files are accepted, or refused with a `BudgetFormerError`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from random import Random
from unittest import mock

import pytest

from budgetformer.errors import BudgetFormerError
from service.cli.serve import read_serve_settings
from service.keys import KeysError, key_line, new_key, read_keys
from service.settings import Settings
from tests.support.mutation import fuzzed, junk, mutated_bytes, text

NAMES = sorted(Settings.model_fields)
ODD = ["", "0", "-1", "1e400", "nan", "true", "[]", "{}", '{"a":1}', "/", "a:1", "::"]


def value(random: Random) -> str:
    """Return a random value, without surrogates and NUL, which environments cannot have."""
    match random.randrange(3):
        case 0:
            return random.choice(ODD)
        case 1:
            return json.dumps(junk(random))
        case _:
            return text(random, 12, surrogates=False).replace("\x00", "")


def argument(random: Random) -> str:
    """Return a flag with a value, or sometimes only one of them."""
    flag = f"--{random.choice(NAMES).replace('_', '-')}"
    return random.choice([f"{flag}={value(random)}"] * 4 + [flag, value(random)])


def read(arguments: list[str]) -> None:
    try:
        settings, _ = read_serve_settings(["--print-config", *arguments])
        json.dumps(settings.printable())
    except BudgetFormerError as error:
        assert str(error)
    except SystemExit as ending:  # the parser has printed the error
        assert ending.code in (0, 2)


@fuzzed(0.4)
def test_random_flags(random: Random) -> None:
    arguments = [argument(random) for _ in range(random.randint(1, 3))]
    with mock.patch.dict(os.environ):
        read(arguments)


@fuzzed(0.2)
def test_random_environment_variables(random: Random) -> None:
    names = random.sample(NAMES, random.randint(1, 3))
    added = {f"BUDGETFORMER_{name.upper()}": value(random) for name in names}
    with mock.patch.dict(os.environ, added):
        read([])


@pytest.fixture(scope="module")
def path(scratch: Path) -> Path:
    return scratch / "file.toml"


@fuzzed(0.2)
def test_mutated_configuration_files(path: Path, random: Random) -> None:
    sample = b'port = 8000\nmodels = ["a"]\nquality = 0.5\n[keys.web]\nsha256 = "00"\n'
    path.write_bytes(mutated_bytes(random, sample))
    with mock.patch.dict(os.environ, BUDGETFORMER_CONFIG=str(path)):
        read([])


@fuzzed(0.2)
def test_mutated_key_files(path: Path, random: Random) -> None:
    sample = f"{key_line('web', new_key(['classify'], burst=3)[1])}\n".encode()
    path.write_bytes(mutated_bytes(random, sample))
    try:
        read_keys(path)
    except KeysError as error:
        assert str(error).startswith(str(path))
