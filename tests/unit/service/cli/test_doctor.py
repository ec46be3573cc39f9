"""`budgetformer doctor`: each check passes a good configuration and reports a bad one."""

from __future__ import annotations

import json
import resource
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest

from budgetformer import cores
from budgetformer.checkpoint.manifest import write_manifest
from budgetformer.checkpoint.store import read_checkpoint, read_store
from budgetformer.cores import usable_cores
from service.cli import startup_checks
from service.cli.startup_checks import Finding, available_memory, examine
from service.settings import Settings
from tests.support.command_line import CommandLine
from tests.support.stores import TOPICS

CHECKS = {
    "device",
    "threads",
    "dtype",
    "store",
    "memory",
    "port",
    "open files",
    "run folder",
    "traces",
}


@pytest.fixture
def copied_store(model_store: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model_store, tmp_path / "store"))


def findings_of(check: str, store: Path, **settings: Any) -> list[Finding]:
    settings = {"model_store": store, "port": 0, "device": "cpu"} | settings
    return [finding for finding in examine(Settings(**settings)) if finding.check == check]


def test_json_has_the_finding_of_every_check(command: CommandLine, model_store: Path) -> None:
    options = ("--port=0", "--device=cpu", "--models", TOPICS, "--engines=1")
    outcome = command("doctor", "--json", f"--model-store={model_store}", *options)
    findings = json.loads(outcome.out)
    assert {finding["check"] for finding in findings} == CHECKS
    assert {tuple(finding) for finding in findings} == {("check", "state", "found", "advice")}
    assert [f for f in findings if f["state"] == "fail"] == []
    assert outcome.code == 0


def test_a_failed_check_gives_advice_and_ends_with_code_1(
    command: CommandLine, copied_store: Path
) -> None:
    (copied_store / TOPICS / "2" / "tokenizer.json").unlink()
    outcome = command("doctor", f"--model-store={copied_store}", "--port=0", "--device=cpu")
    assert outcome.code == 1
    shown = " ".join(outcome.out.split())
    assert "fail" in shown
    assert "models add" in shown
    assert "\x1b" not in outcome.out


def test_an_unknown_option_ends_with_code_2(command: CommandLine) -> None:
    outcome = command("doctor", "--prot=1")
    assert (outcome.code, outcome.out) == (2, "")
    assert "--prot=1" in outcome.err


class TestStore:
    def test_a_valid_store_passes(self, model_store: Path) -> None:
        assert [
            f.found.partition(":")[0] for f in findings_of("store", model_store, models=[TOPICS])
        ] == [TOPICS]

    def test_damaged_weights_fail(self, copied_store: Path) -> None:
        path = copied_store / TOPICS / "2" / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-1] + b"x")
        states = {f.state: f.found for f in findings_of("store", copied_store)}
        assert "sha256 differs" in states["fail"]

    def test_a_broken_manifest_fails(self, copied_store: Path) -> None:
        (copied_store / TOPICS / "1" / "manifest.json").write_text("{")
        assert "fail" in {f.state for f in findings_of("store", copied_store)}

    def test_a_model_without_quality_levels_is_a_warning(self, model_store: Path) -> None:
        (finding,) = findings_of("store", model_store, models=["picky"])
        state = "ok" if "no quality" not in finding.found else "warn"
        assert finding.state == state

    @pytest.mark.parametrize("models", [["nothing"], [f"{TOPICS}:9"]])
    def test_a_missing_model_fails(self, model_store: Path, models: list[str]) -> None:
        assert findings_of("store", model_store, models=models)[0].state == "fail"

    def test_an_empty_or_missing_store_fails(self, tmp_path: Path) -> None:
        assert findings_of("store", tmp_path)[0].state == "fail"
        assert findings_of("store", tmp_path / "nowhere")[0].state == "fail"


@pytest.mark.parametrize("name", ["port", "grpc_port"])
def test_a_port_in_use_fails(model_store: Path, name: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        ports = {"port": 0, name: taken.getsockname()[1]}
        (finding,) = findings_of("port", model_store, **ports)
        assert (finding.state, bool(finding.advice)) == ("fail", True)
    (finding,) = findings_of("port", model_store)
    assert finding.state == "ok"


def test_more_threads_than_cores_is_a_warning(model_store: Path) -> None:
    (finding,) = findings_of("threads", model_store, engines=usable_cores() + 1)
    assert finding.state == "warn"
    assert f"--engines {usable_cores()}" in (finding.advice or "")


@pytest.fixture
def container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder in place of a container's /sys/fs/cgroup."""
    folder = tmp_path / "cgroup"
    folder.mkdir()
    monkeypatch.setattr(cores, "CGROUPS", folder)
    monkeypatch.setattr(cores, "MEMBERSHIP", folder / "none")
    return folder


def test_a_container_with_less_than_a_core_is_a_warning(model_store: Path, container: Path) -> None:
    (container / "cpu.max").write_text("50000 100000\n")
    (finding,) = findings_of("threads", model_store, engines=1)
    assert finding.state == "warn"
    (container / "cpu.max").write_text("max 100000\n")
    (finding,) = findings_of("threads", model_store, engines=1)
    assert finding.state == "ok"


@pytest.mark.parametrize(
    ("free", "engines", "state"),
    [(10, 1, "fail"), (300, 1, "fail"), (600, 9, "warn"), (600, 3, "ok")],
)
def test_memory_is_compared_with_the_needs_of_engines(
    model_store: Path, container: Path, free: int, engines: int, state: str
) -> None:
    (container / "memory.max").write_text(str(2**30))
    (container / "memory.current").write_text(str(2**30 - free * 2**20))
    assert available_memory() <= free * 2**20
    (finding,) = findings_of("memory", model_store, engines=engines, models=[TOPICS])
    assert finding.state == state


def test_the_precision_is_compared_with_the_instructions_of_the_processor(
    model_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for flags, dtype, state in (
        ({"avx2"}, "bfloat16", "warn"),
        ({"avx2"}, "auto", "ok"),
        ({"amx_bf16"}, "bfloat16", "ok"),
        ({"avx2", "avx512_bf16"}, "bfloat16", "warn"),
        ({"amx_bf16"}, "float32", "warn"),
        ({"avx2"}, "fastest", "warn"),
        ({"avx2"}, "int8", "ok"),
        ({"avx2", "amx_bf16"}, "int8", "warn"),
        ({"sse2"}, "int8", "fail"),
    ):
        monkeypatch.setattr(startup_checks, "cpu_flags", lambda flags=flags: flags)
        (finding,) = findings_of("dtype", model_store, dtype=dtype)
        assert finding.state == state


def test_auto_names_the_precision_that_it_selects(
    model_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for flags, precision in (
        ({"avx2", "amx_bf16"}, "bfloat16;"),
        ({"avx2", "avx512_bf16"}, "int8, float32 without ranges of states;"),
        ({"sse2"}, "float32;"),
    ):
        monkeypatch.setattr(startup_checks, "cpu_flags", lambda flags=flags: flags)
        (finding,) = findings_of("dtype", model_store, dtype="auto")
        assert finding.found.startswith(f"auto: {precision}")


def test_int8_without_ranges_fails(copied_store: Path) -> None:
    (finding,) = findings_of("store", copied_store, dtype="int8", models=[TOPICS])
    assert finding.state == "ok"
    path = read_store(copied_store).latest(TOPICS).path
    manifest = read_checkpoint(path).manifest
    write_manifest(path, manifest.model_copy(update={"ranges": ()}))
    (finding,) = findings_of("store", copied_store, dtype="int8", models=[TOPICS])
    assert finding.state == "fail"
    assert "no ranges" in finding.found


def test_a_missing_gpu_fails_and_an_unusable_one_is_a_warning(
    model_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    (finding,) = findings_of("device", model_store, device="cuda")
    assert finding.state == "fail"
    monkeypatch.setattr(shutil, "which", lambda _: "/usr/bin/nvidia-smi")
    (finding,) = findings_of("device", model_store, device="auto")
    assert finding.state == "warn"


def test_a_gpu_without_compiler_or_headers_fails(
    model_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "a GPU")
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda **_: True)
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"include": str(tmp_path)})
    monkeypatch.delenv("CC", raising=False)
    for compiler, header, missing in (
        (None, True, "C compiler"),
        ("/usr/bin/gcc", False, "Python.h"),
        ("/usr/bin/gcc", True, None),
    ):
        monkeypatch.setattr(shutil, "which", lambda _, path=compiler: path)
        (tmp_path / "Python.h").unlink(missing_ok=True)
        if header:
            (tmp_path / "Python.h").touch()
        (finding,) = findings_of("device", model_store, device="cuda")
        assert finding.state == ("ok" if missing is None else "fail")
        assert (missing or "a GPU") in finding.found


def test_a_low_limit_of_open_files_is_a_warning(model_store: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
        (finding,) = findings_of("open files", model_store)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert finding.state == "warn"


def test_without_a_folder_for_sockets_it_fails(
    model_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(model_store / "nowhere"))
    (finding,) = findings_of("run folder", model_store)
    assert (finding.state, finding.found) == ("ok", "/dev/shm can be written")
    monkeypatch.setattr("service.process.SHARED_MEMORY", str(model_store / "nowhere"))
    (finding,) = findings_of("run folder", model_store)
    assert finding.state == "fail"
    assert "TMPDIR" in (finding.advice or "")


def test_an_unknown_trace_exporter_fails(
    model_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "zipkin")
    (finding,) = findings_of("traces", model_store)
    assert finding.state == "fail"
