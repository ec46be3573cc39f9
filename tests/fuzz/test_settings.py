"""Settings and keys from flags, environment and files: taken, or one `BudgetFormerError`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from budgetformer.errors import BudgetFormerError
from service.access import KeysError, key_line, new_key, read_keys
from service.cli.serve import read_serve_settings
from service.settings import Settings
from tests.support.mutation import fuzzed, junk, mutated_bytes

NAMES = sorted(Settings.model_fields)
texts = st.one_of(
    st.text(st.characters(exclude_characters="\x00", exclude_categories=["Cs"]), max_size=12),
    junk.map(json.dumps),
    st.sampled_from(
        ["", "0", "-1", "1e400", "nan", "true", "[]", "{}", '{"a":1}', "/", "a:1", "::"]
    ),
)
flags = st.sampled_from(NAMES).map(lambda name: f"--{name.replace('_', '-')}")
arguments = st.lists(st.tuples(flags, texts).map("=".join) | flags | texts, min_size=1, max_size=3)


def read(given_arguments: list[str]) -> None:
    try:
        settings, _ = read_serve_settings(["--print-config", *given_arguments])
        json.dumps(settings.printable())
    except BudgetFormerError as error:
        assert str(error)
    except SystemExit as ending:  # the parser of the command line says what was wrong
        assert ending.code in (0, 2)


@fuzzed(0.1)
@given(arguments)
def test_flags(given_arguments: list[str]) -> None:
    with mock.patch.dict(os.environ):
        read(given_arguments)


@fuzzed(0.05)
@given(st.dictionaries(st.sampled_from(NAMES), texts, min_size=1, max_size=3))
def test_environment(values: dict[str, str]) -> None:
    added = {f"BUDGETFORMER_{name.upper()}": value for name, value in values.items()}
    with mock.patch.dict(os.environ, added):
        read([])


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("files") / "file.toml"


@fuzzed(0.05)
@given(data=st.data())
def test_file(path: Path, data: st.DataObject) -> None:
    sample = b'port = 8000\nmodels = ["a"]\nquality = 0.5\n[keys.web]\nsha256 = "00"\n'
    path.write_bytes(data.draw(mutated_bytes(sample)))
    with mock.patch.dict(os.environ, BUDGETFORMER_CONFIG=str(path)):
        read([])


@fuzzed(0.05)
@given(data=st.data())
def test_key_file(path: Path, data: st.DataObject) -> None:
    sample = f"{key_line('web', new_key(['classify'], burst=3)[1])}\n".encode()
    path.write_bytes(data.draw(mutated_bytes(sample)))
    try:
        read_keys(path)
    except KeysError as error:
        assert str(error).startswith(str(path))
