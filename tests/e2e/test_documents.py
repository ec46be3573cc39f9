"""Every command and snippet of README and docs runs, in a folder like that of a reader."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import pytest
import typer
from typer.main import get_command

from budgetformer.checkpoint.manifest import write_manifest
from budgetformer.checkpoint.store import read_checkpoint
from service.cli import app
from service.cli.serve import read_serve_settings
from tests.support.classifiers import save_classifier
from tests.support.command_line import CommandLine
from tests.support.documents import PAGES, ROOT, Block, blocks_of
from tests.support.processes import Server, clean_environment, free_port, server
from tests.support.programs import program
from tests.support.serving import ADMIN_KEY
from tests.support.stores import TOPICS, single_label_rows, write_jsonl

pytestmark = pytest.mark.timeout(300)

NOT_RUN = {
    "budgetformer train": "takes hours: its options are read",
    "budgetformer import my_encoder/": "takes minutes: its options are read; "
    "docs/examples/convert.py runs it",
    "budgetformer import my_classifier/ --texts log.jsonl --effort hours": "takes minutes: its "
    "options are read; tests/unit/budgetformer/adoption runs it",
    "budgetformer evaluate --data my_texts/test.parquet --model my_model": "needs a long training",
    "budgetformer serve": "does not end: its settings are read; a server runs beside this test",
    "budgetformer classify --file million.jsonl": "takes minutes: its options are read",
    "budgetformer tune": "times the machine: its options are read",
    "budgetformer bench": "times the machine: its options are read",
    "make": "sets up an environment of its own: a dry run; CI runs `make test`",
    "pip install": "installs: tests/unit/test_documents.py looks for the extra",
    "docker compose": "needs Docker: tests/e2e/compose runs the stack; its files are looked for",
    "python -m budgetformer.experiments": "takes hours: its options are read",
    "python -m tests": "is a test's: it is looked for",
    "python -m service.simulation": "takes minutes: it is looked for",
    "python loadtests/compression.py": "needs a running server: it is looked for",
    "python loadtests/observing.py": "times the machine: it is looked for",
    "python loadtests/overload.py": "loads the machine: it is looked for",
    "python loadtests/simulation.py": "times the machine: it is looked for",
    "python -m loadtests": "loads or breaks a server for minutes: it is looked for",
    "python loadtests/compare.py": "loads the machine: it is looked for",
    "python loadtests/benchmark.py": "loads the machine: it is looked for",
    "python loadtests/openloop.py": "times the machine: it is looked for",
    "python loadtests/idle.py": "times the machine: it is looked for",
    "python -m loadtests.cluster": "needs Ray, and loads the machine: it is looked for",
}
"""Commands that are checked without running them, and why."""

CODE = [page for page in PAGES if any(b.language in ("bash", "python") for b in blocks_of(page))]


@pytest.fixture(scope="module")
def named_store(model_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a store in which a small model has the name of a shipped one."""
    store = tmp_path_factory.mktemp("documented") / "model_store"
    for version, source in (("2", "1"), ("3", "2")):
        folder = store / "ag_news" / version
        shutil.copytree(model_store / TOPICS / source, folder)
        manifest = read_checkpoint(folder).manifest
        write_manifest(
            folder, manifest.model_copy(update={"name": "ag_news", "version": int(version)})
        )
    return store


@cache
def grpc_address() -> str:
    """Return the gRPC address of the server for the pages."""
    return f"127.0.0.1:{free_port()}"


@pytest.fixture(scope="module")
def documented(named_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Return the server that the commands of the pages use."""
    folder = tmp_path_factory.mktemp("serving")
    port = grpc_address().partition(":")[2]
    with server(named_store, folder, engines=1, admin_key=ADMIN_KEY, grpc_port=port) as running:
        yield running


@pytest.fixture
def reader(named_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Change to a folder with the files that the pages assume."""
    shutil.copytree(named_store, tmp_path / "model_store")
    shutil.copytree(named_store / "ag_news" / "3", tmp_path / "trained" / "ag_news")
    shutil.make_archive(str(tmp_path / "ag_news"), "gztar", named_store / "ag_news" / "3")
    rows = single_label_rows()
    texts = [str(row["text"]) for row in rows]
    (tmp_path / "reviews.csv").write_text("text\n" + "".join(f'"{text}"\n' for text in texts))
    (tmp_path / "my_texts").mkdir()
    table = "text,label\n" + "".join(f'"{row["text"]}",{row["label"]}\n' for row in rows)
    for name in ("train.csv", "test.csv"):
        (tmp_path / "my_texts" / name).write_text(table)
    save_classifier(tmp_path / "my_classifier", "bert")
    write_jsonl(tmp_path / "log.jsonl", ({"text": text} for text in texts))
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    for name in ("my_texts/test.parquet", "my_labelled_texts.parquet"):
        parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / name)
    for name in ("docs", "loadtests"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", CODE, ids=lambda page: page.name)
def test_the_code_of_a_page_runs(
    documented: Server, command: CommandLine, reader: Path, page: Path
) -> None:
    for block in blocks_of(page):
        if block.language == "python":
            _run_python(block, documented.url)
        elif block.language == "bash":
            for line in block.code.replace("\\\n", " ").splitlines():
                _run_line(block, line, documented.url, command, reader)


@pytest.mark.parametrize("family", ["distilbert", "modernbert", "deberta-v2"])
def test_the_page_about_classifiers_works_for_other_families(
    documented: Server, command: CommandLine, reader: Path, family: str
) -> None:
    shutil.rmtree(reader / "my_classifier")
    save_classifier(reader / "my_classifier", family)
    test_the_code_of_a_page_runs(
        documented, command, reader, ROOT / "docs" / "bring-your-classifier.md"
    )
    assert len(list((reader / "model_store" / "mine").iterdir())) == 3


def _at(url: str, text: str) -> str:
    """Replace the addresses on ports 8000 and 8001 by those of the test server."""
    host = url.removeprefix("http://")
    text = text.replace("127.0.0.1:8001", grpc_address())
    return text.replace("127.0.0.1:8000", host).replace("localhost:8000", host)


def _run_python(block: Block, url: str) -> None:
    lead = "\n" * block.line  # so that an error names the page's line
    exec(compile(lead + _at(url, block.code), str(block.page), "exec"), {"__name__": "__main__"})


def _run_line(block: Block, line: str, url: str, command: CommandLine, reader: Path) -> None:
    words = Block(block.page, block.line, "bash", _at(url, line)).commands()
    if not words:
        return
    (given,) = words
    where = f"{block}: {line}"
    while "=" in given[0] and given[0].partition("=")[0].isupper():
        given = given[1:]  # a variable set for one command
    plain = " ".join(given)
    if any(plain.startswith(start) for start in NOT_RUN):
        _check(given, where)
    elif given[0] == "budgetformer":
        asked, file = (given[:-2], given[-1]) if ">>" in given else (given, None)
        outcome = command(*asked[1:])
        assert outcome.code == 0, f"{where}\n{outcome}"
        if file is not None:
            with (reader / file).open("a") as kept:
                kept.write(outcome.out)
    elif given[0] == "echo" and "|" in given:
        pipe = given.index("|")
        outcome = command(*given[pipe + 2 :], stdin=" ".join(given[1:pipe]) + "\n")
        assert outcome.code == 0, f"{where}\n{outcome}"
    else:
        assert given[0] in ("curl", "python", "node"), (
            f"{where}: this test does not know how to run it"
        )
        start = sys.executable if given[0] == "python" else program(given[0])
        done = subprocess.run(
            [start, *given[1:]], cwd=reader, capture_output=True, text=True, check=False,
            timeout=200, env=clean_environment() | {"PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        assert done.returncode == 0, f"{where}\n{done.stdout}{done.stderr}"
        if given[0] == "curl":
            answer = json.loads(done.stdout)
            # A job has a field `error` too, which is null.
            refused = isinstance(answer, dict) and answer.get("error")
            assert not refused, f"{where}\n{done.stdout}"


def _check(given: list[str], where: str) -> None:
    """Check a command without running it."""
    match given:
        case ["budgetformer", "serve", *rest]:
            read_serve_settings(rest)
        case ["budgetformer", *rest]:
            _parse(rest)
        case ["make", *rest]:
            dry = [program("make"), "--dry-run", *rest]
            done = subprocess.run(dry, cwd=ROOT, capture_output=True, text=True, check=False)
            assert done.returncode == 0, f"{where}\n{done.stderr}"
        case ["docker", "compose", *rest]:
            named = [b for a, b in zip(rest, rest[1:], strict=False) if a == "-f"]
            assert all((ROOT / name).is_file() for name in named), where
        case ["python", "-m", module, *rest]:
            assert find_spec(module) is not None, where
            if module.startswith("budgetformer.training"):
                usage = subprocess.run(
                    [sys.executable, "-m", module, "--help"],
                    capture_output=True, text=True, check=True, cwd=ROOT,
                ).stdout  # fmt: skip
                assert all(word in usage for word in rest if word.startswith("--")), where
        case ["python", path, *_]:
            assert (ROOT / path).is_file(), where
        case ["pip", "install", *_]:
            pass
        case _:
            pytest.fail(f"{where}: this test does not know how to check it")


def _parse(arguments: list[str]) -> None:
    """Parse a command without running it."""
    found: Any = get_command(app)
    context: typer.Context | None = None
    while hasattr(found, "commands"):
        name, *arguments = arguments
        context = found.make_context(name, [], parent=context, resilient_parsing=True)
        found = found.commands[name]
    found.make_context("command", arguments, parent=context)


def test_parsing_finds_unknown_options() -> None:
    _parse(["train", "--data", ".", "--out", "store/mine/1"])
    _parse(["bench", "pass", "--rounds", "3"])
    with pytest.raises(Exception, match="No such option"):
        _parse(["train", "--data", ".", "--out", "store/mine/1", "--nonsense"])


def test_commands_that_are_not_run_occur_in_the_pages() -> None:
    lines = [
        " ".join(words)
        for page in PAGES
        for block in blocks_of(page)
        if block.language == "bash"
        for words in block.commands()
    ]
    inline = [text for page in PAGES for text in page.read_text().split("`")]
    for start in NOT_RUN:
        assert any(start in line for line in (*lines, *inline)), f"{start} is in no page"


def test_the_answer_in_the_readme_has_the_fields_of_an_answer(documented: Server) -> None:
    (shown,) = (b for b in blocks_of(ROOT / "README.md") if b.language == "json")
    answer = httpx.post(f"{documented.url}/classify", json={"input": "The otter slept."}).json()
    assert _form(json.loads(shown.code)) == _form(answer)


def _form(part: Any) -> Any:
    if isinstance(part, dict):
        return {key: _form(value) for key, value in part.items()}
    return [_form(part[0])] if isinstance(part, list) else None


class TestExamples:
    def test_the_python_example_classifies_a_csv(self, reader: Path) -> None:
        done = self.run(reader, sys.executable, "classify_csv.py", "my_texts/test.csv", "out.csv")
        rows = (reader / "out.csv").read_text().splitlines()
        assert rows[0] == "text,label,score,heads"
        assert f"{len(rows) - 1} rows" in done
        assert len(rows) - 1 == len(single_label_rows())

    def test_the_javascript_example_prints_answers_and_errors(
        self, reader: Path, documented: Server
    ) -> None:
        node = program("node")
        shown = self.run(reader, node, "classify.mjs", documented.url, "The otter slept.", "Fog.")
        assert len(shown.splitlines()) == 2
        assert "of 8 heads" in shown
        failed = subprocess.run(
            [node, ROOT / "docs/examples/classify.mjs", documented.url],
            capture_output=True, text=True, check=False, timeout=60,
        )  # fmt: skip
        assert failed.returncode == 1
        assert "input" in failed.stderr

    def run(self, reader: Path, start: str, name: str, *arguments: str) -> str:
        done = subprocess.run(
            [start, ROOT / "docs" / "examples" / name, *arguments],
            cwd=reader, capture_output=True, text=True, check=False, timeout=100,
            env=clean_environment() | {"PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout
