"""Weights that several passes, of several processes, hold once."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from budgetformer.compact import PackedPass, load_pass
from budgetformer.compact.shared import ALIGNMENT, share
from tests.support.networks import pack, random_items, random_network, small_config

ITEMS = pack(random_items([5, 9, 2]))


def some() -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(3, 5), torch.randn(7, 2).half(), torch.randn(1, 1).bfloat16()]


def is_mapped(tensor: Tensor, path: Path) -> bool:
    """Say whether a tensor lies where a file is mapped."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        place, *_, name = line.split(maxsplit=5)
        start, stop = (int(end, 16) for end in place.split("-"))
        if start <= tensor.data_ptr() < stop:
            return name == str(path)
    raise AssertionError("it is nowhere")


def test_values_stay_and_lie_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    for tensors in (some(), some()):
        before = [tensor.data_ptr() for tensor in tensors]
        share(tensors, path)
        for tensor, was, value in zip(tensors, before, some(), strict=True):
            assert torch.equal(tensor, value)
            assert tensor.dtype == value.dtype
            assert tensor.data_ptr() != was
            assert tensor.data_ptr() % ALIGNMENT == 0
            assert is_mapped(tensor, path)


def test_the_file_may_go_while_it_is_mapped(tmp_path: Path) -> None:
    path, tensors = tmp_path / "weights", some()
    share(tensors, path)
    path.unlink()
    assert all(map(torch.equal, tensors, some()))


def test_what_is_not_the_same_stays_apart(tmp_path: Path) -> None:
    path, others = tmp_path / "weights", some()
    share(some(), path)
    others[0][0, 0] += 1
    kept = others[0].clone()
    share(others, path)
    assert torch.equal(others[0], kept)
    assert not is_mapped(others[0], path)
    assert is_mapped(others[1], path)


@pytest.mark.parametrize("begun", [0, 1])
def test_a_disk_that_is_full_leaves_all_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, begun: int
) -> None:
    path, tensors, opened = tmp_path / "weights", some(), Path.open
    before = [tensor.data_ptr() for tensor in tensors]

    class Full:
        def __init__(self, file: Any) -> None:
            self.file, self.left = file, begun

        def __enter__(self) -> Full:
            return self

        def __exit__(self, *_: object) -> None:
            self.file.close()

        def write(self, data: bytes) -> None:
            if not self.left:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self.left -= 1
            self.file.write(data)

    def full(at: Path, mode: str = "r") -> Any:
        return Full(opened(at, mode)) if mode == "wb" else opened(at, mode)

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(OSError, match="No space left"):
        share(tensors, path)
    assert [tensor.data_ptr() for tensor in tensors] == before
    assert not path.exists()
    assert [entry.name for entry in tmp_path.iterdir()] == ["weights.lock"]


def test_a_file_that_was_cut_leaves_all_as_it_was(tmp_path: Path) -> None:
    path, tensors = tmp_path / "weights", some()
    path.write_bytes(b"short")
    before = [tensor.data_ptr() for tensor in tensors]
    with pytest.raises(OSError, match="weights"):
        share(tensors, path)
    assert [tensor.data_ptr() for tensor in tensors] == before
    assert path.read_bytes() == b"short"


def test_a_folder_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        share(some(), tmp_path / "nowhere" / "weights")


@pytest.mark.parametrize("selection", ["ranked", "input"])
@pytest.mark.parametrize("coupled", [True, False])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_passes_that_share_answer_as_before(
    tmp_path: Path, selection: str, coupled: bool, precision: str
) -> None:
    def made() -> PackedPass:
        return load_pass(
            random_network(small_config(head_selection=selection, budget_ffn=coupled)), precision
        )

    def answer(one: PackedPass) -> Tensor:
        arrival = one.arrive(ITEMS)
        steps = [one.config.num_steps] * 3
        return one.run(ITEMS, steps, arrival.exit_logits, arrival.ranking).logits

    alone, first, second = made(), made(), made()
    answer(first)  # what it has laid out by now is not shared
    for one in (first, second):
        one.take_over()
        one.share(tmp_path / "weights")
    right = answer(alone)
    assert torch.equal(answer(first), right)
    assert torch.equal(answer(second), right)
    for one in (first, second):
        assert all(is_mapped(w, tmp_path / "weights") for w in one._slices.weights)
    assert second.nbytes < 2 * alone.nbytes
