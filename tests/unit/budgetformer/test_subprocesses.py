"""Child processes of Python import nothing from their working directory."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from budgetformer.subprocesses import python_command, shadowing_files

ROOT = Path(__file__).parents[3]
SOURCES = [path for name in ("budgetformer", "service") for path in (ROOT / name).rglob("*.py")]


@pytest.mark.parametrize(
    "arguments", [("-c", "import json; print(json.__file__)"), ("-m", "json", "--help")], ids=str
)
def test_a_child_imports_nothing_from_its_working_directory(
    tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    (tmp_path / "json.py").write_text("raise SystemExit('imported from here')\n")
    done = subprocess.run(
        python_command(*arguments), cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert "from here" not in done.stderr
    assert str(tmp_path) not in done.stdout


def test_all_child_processes_are_started_by_one_module() -> None:
    starting = [
        path.relative_to(ROOT).as_posix()
        for path in SOURCES
        if re.search(r"sys\.executable|multiprocessing|ProcessPoolExecutor", path.read_text())
    ]
    assert starting == ["budgetformer/subprocesses.py"]


def test_files_that_shadow_modules_are_listed(tmp_path: Path) -> None:
    (tmp_path / "json.py").touch()
    (tmp_path / "pytest").mkdir()
    (tmp_path / "pytest" / "__init__.py").touch()
    (tmp_path / "pathlib").mkdir()
    (tmp_path / "nobody_imports_this.py").touch()
    assert shadowing_files(tmp_path) == [
        str(tmp_path / "json.py"), str(tmp_path / "pytest" / "__init__.py"),
    ]  # fmt: skip
    assert shadowing_files(ROOT) == []
