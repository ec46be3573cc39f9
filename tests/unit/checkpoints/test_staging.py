"""A checkpoint folder appears complete or not at all, even if its program fails or is killed."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from budgetformer.adoption.recalibration import recalibrate
from budgetformer.checkpoint.install import install
from budgetformer.checkpoint.staging import staged
from budgetformer.checkpoint.store import read_checkpoint, read_store
from budgetformer.errors import BudgetFormerError, CheckpointError, DataError
from tests.support.stores import TOPICS, single_label_rows, train, write_jsonl


@contextmanager
def file_limit(size: int) -> Iterator[None]:
    """Make writes beyond `size` bytes of a file fail, like on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def files_below(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


class Stop(BaseException):
    """An error that no handler expects."""


def fail(path: Path, error: type[BaseException]) -> None:
    path.write_text("half")
    raise error


class TestStaged:
    def test_the_folder_appears_at_the_end(self, tmp_path: Path) -> None:
        target = tmp_path / "store" / "name" / "1"
        with staged(target) as folder:
            (folder / "manifest.json").write_text("{}")
            assert not target.exists()
            assert read_store(tmp_path / "store").errors == []
        assert files_below(target.parent) == ["1", "1/manifest.json"]

    def test_the_folder_is_readable_by_others(self, tmp_path: Path) -> None:
        with staged(tmp_path / "1") as folder:
            (folder / "manifest.json").write_text("{}")
        assert (tmp_path / "1").stat().st_mode & 0o005 == 0o005 & ~current_umask()

    @pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, Stop, ValueError])
    @pytest.mark.parametrize("exists", [False, True])
    def test_a_failure_keeps_the_previous_state(
        self, tmp_path: Path, error: type[BaseException], exists: bool
    ) -> None:
        target = tmp_path / "name" / "1"
        if exists:
            target.mkdir(parents=True)
            (target / "manifest.json").write_text("earlier")
        before = files_below(tmp_path) or ["name"]
        with pytest.raises(error), staged(target, replace=True) as folder:
            fail(folder / "manifest.json", error)
        assert files_below(tmp_path) == before

    @pytest.mark.parametrize("write", ["plain", "safetensors"])
    def test_a_full_disk_is_one_line(self, tmp_path: Path, write: str) -> None:
        def fill(folder: Path) -> None:
            if write == "plain":
                (folder / "tokenizer.json").write_bytes(bytes(10_000))
            else:
                save_file({"weight": torch.zeros(10_000)}, folder / "model.safetensors")

        with (
            pytest.raises(CheckpointError, match=str(tmp_path / "1")) as caught,
            file_limit(1000),
            staged(tmp_path / "1") as folder,
        ):
            fill(folder)
        assert "\n" not in str(caught.value)
        assert files_below(tmp_path) == []

    def test_a_checkpoint_is_replaced_completely(self, tmp_path: Path) -> None:
        for word in ("earlier", "later"):
            with staged(tmp_path / "1", replace=True) as folder:
                (folder / "manifest.json").write_text(word)
                (folder / word).touch()
        assert files_below(tmp_path) == ["1", "1/later", "1/manifest.json"]

    @pytest.mark.parametrize(("name", "replace"), [("manifest.json", False), ("thesis.txt", True)])
    def test_existing_folders_are_kept(self, tmp_path: Path, name: str, replace: bool) -> None:
        (tmp_path / "1").mkdir()
        (tmp_path / "1" / name).write_text("mine")
        before = files_below(tmp_path)
        with pytest.raises(CheckpointError, match="exists"), staged(tmp_path / "1", replace) as new:
            (new / "manifest.json").write_text("{}")
        assert files_below(tmp_path) == before

    def test_a_file_in_place_of_the_store_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "store").touch()
        with (
            pytest.raises(CheckpointError, match="store"),
            staged(tmp_path / "store" / "name" / "1"),
        ):
            pass

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    def test_a_killed_program_leaves_no_files(self, tmp_path: Path, number: int) -> None:
        program = (
            "import sys, time; from pathlib import Path\n"
            "from budgetformer.checkpoint.staging import staged\n"
            "with staged(Path(sys.argv[1])) as folder:\n"
            "    (folder / 'manifest.json').write_text('half'); print('half', flush=True)\n"
            "    while True: time.sleep(60)\n"
        )
        command = [sys.executable, "-c", program, str(tmp_path / "1")]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        ) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == b"half\n"
            process.send_signal(number)
            assert process.wait(60) != 0
        assert files_below(tmp_path) == []

    def test_signal_handlers_are_restored(self, tmp_path: Path) -> None:
        before = signal.getsignal(signal.SIGTERM)
        with staged(tmp_path / "1") as folder:
            (folder / "manifest.json").write_text("{}")
        assert signal.getsignal(signal.SIGTERM) == before


def current_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


SMALL_DISK = 20_000
"""Bytes, less than the weights and more than a configuration."""

COMMANDS: dict[str, Callable[[Path, Path], object]] = {
    "train": lambda _, store: train(store / "new" / "1", single_label_rows()[:60], dense_epochs=1),
    "calibrate": lambda source, store: recalibrate(
        read_checkpoint(source),
        write_jsonl(store.parent / "more.jsonl", single_label_rows()),
        store / "new" / "1",
        lambda _: None,
    ),
    "models add": lambda source, store: install(str(source), store),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_full_disk_leaves_no_version(model_store: Path, tmp_path: Path, command: str) -> None:
    store = tmp_path / "store"
    with pytest.raises(BudgetFormerError), file_limit(SMALL_DISK):
        COMMANDS[command](model_store / TOPICS / "2", store)
    assert not list(store.glob("*/[0-9]*"))
    assert not list(store.glob(".adding-*"))
    assert not list(store.glob("*/.*.new-*"))


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("new/0", "version"),
        ("new/one", "version"),
        (f"new/{2**63}", "version"),
        ("new name/1", "model name"),
        (".new/1", "model name"),
        ("taken/1", "exists"),
    ],
)
def test_an_invalid_output_is_refused_before_training(
    tmp_path: Path, output: str, message: str
) -> None:
    (tmp_path / "store/taken/1").mkdir(parents=True)
    with pytest.raises((DataError, CheckpointError), match=message):
        train(tmp_path / "store" / output, single_label_rows(), dense_epochs=1000)
