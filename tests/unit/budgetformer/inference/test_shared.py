"""Weights that several passes, of several processes, hold once."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from budgetformer.inference import shared_file
from budgetformer.inference.packed import PackedPass
from budgetformer.inference.precision_choice import load_pass
from budgetformer.inference.range_observer import measure_ranges
from budgetformer.inference.shared import ALIGNMENT, SharedTensors
from tests.support.networks import pack, random_items, random_network, small_config

ITEMS = pack(random_items([5, 9, 2]))


def some() -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(3, 5), torch.randn(7, 2).half(), torch.randn(1, 1).bfloat16()]


def mapping(tensor: Tensor) -> list[str]:
    """Return what the system says of the memory that a tensor lies in, a word each."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        words = line.split(maxsplit=5)
        start, stop = (int(end, 16) for end in words[0].split("-"))
        if start <= tensor.data_ptr() < stop:
            return words
    raise AssertionError("it is nowhere")


def is_mapped(tensor: Tensor) -> bool:
    """Say whether a tensor lies where a file in memory is mapped."""
    return mapping(tensor)[-1].startswith("/memfd:weights")


def inode(tensors: list[Tensor]) -> str:
    """Return which file tensors lie in."""
    (number,) = {mapping(tensor)[4] for tensor in tensors}
    return number


@pytest.fixture
def link(tmp_path: Path) -> Path:
    return tmp_path / "weights-of-one"


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_values_stay_and_lie_in_one_file(link: Path) -> None:
    first, second = some(), some()
    holders = [SharedTensors(link), SharedTensors(link)]
    for holder, tensors in zip(holders, (first, second), strict=True):
        before = [tensor.data_ptr() for tensor in tensors]
        holder.hold(tensors)
        for tensor, was, value in zip(tensors, before, some(), strict=True):
            assert torch.equal(tensor, value)
            assert tensor.dtype == value.dtype
            assert tensor.data_ptr() != was
            assert tensor.data_ptr() % ALIGNMENT == 0
            assert is_mapped(tensor)
    assert inode(first) == inode(second)
    for holder in holders:
        holder.forget()


def test_who_has_mapped_it_keeps_it_and_nobody_finds_it(link: Path) -> None:
    files, tensors, later = open_files(), some(), some()
    holder, other = SharedTensors(link), SharedTensors(link)
    holder.hold(tensors)
    holder.forget()
    assert not link.is_symlink()
    assert open_files() == files
    assert all(map(torch.equal, tensors, some()))
    other.hold(later)
    assert inode(later) != inode(tensors)
    other.forget()
    other.forget()
    assert open_files() == files


def test_one_that_is_loaded_anew_goes_on_to_share(link: Path) -> None:
    files, old, new, last = open_files(), some(), some(), some()
    holders = [SharedTensors(link) for _ in range(3)]
    holders[0].hold(old)
    holders[1].hold(new)
    holders[0].forget()
    holders[0].forget()
    holders[2].hold(last)
    assert inode(old) == inode(new) == inode(last)
    for holder in holders:
        holder.forget()
    assert not link.is_symlink()
    assert open_files() == files


def test_who_has_not_made_it_leaves_it_to_be_found(link: Path) -> None:
    held, read, write = some(), *os.pipe()
    holder = SharedTensors(link)
    holder.hold(held)
    other = os.fork()
    if not other:  # what it inherits is not its own, as for one that was started by itself
        shared_file._files.clear()
        shared_file._users.clear()
        tensors, reader = some(), SharedTensors(link)
        reader.hold(tensors)
        reader.forget()
        os.write(write, inode(tensors).encode())
        os._exit(0)
    os.waitpid(other, 0)
    assert os.read(read, 100).decode() == inode(held)
    assert link.exists()
    os.close(read)
    os.close(write)
    holder.forget()


def gone(link: Path) -> None:
    link.symlink_to("/proc/0/fd/1")


def another_file(link: Path) -> None:
    (link.parent / "another").write_bytes(b"short")
    link.symlink_to(link.parent / "another")


def a_pipe(link: Path) -> None:
    os.mkfifo(link.parent / "pipe")
    link.symlink_to(link.parent / "pipe")


@pytest.mark.parametrize("led", [gone, another_file, a_pipe])
def test_a_link_that_leads_elsewhere_is_made_anew(link: Path, led: Callable[[Path], None]) -> None:
    led(link)
    tensors, holder = some(), SharedTensors(link)
    holder.hold(tensors)
    assert is_mapped(tensors[0])
    assert all(map(torch.equal, tensors, some()))
    holder.forget()


def test_what_is_not_the_same_stays_apart(link: Path) -> None:
    holder, other = SharedTensors(link), SharedTensors(link)
    others = some()
    holder.hold(some())
    others[0][0, 0] += 1
    kept = others[0].clone()
    other.hold(others)
    assert torch.equal(others[0], kept)
    assert not is_mapped(others[0])
    assert is_mapped(others[1])
    holder.forget()


def no_memory(_: str) -> int:
    raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))


def test_where_no_file_can_be_made_all_stays_as_it_was(
    link: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files, tensors = open_files(), some()
    before = [tensor.data_ptr() for tensor in tensors]
    monkeypatch.setattr(os, "memfd_create", no_memory)
    with pytest.raises(OSError, match="Cannot allocate"):
        SharedTensors(link).hold(tensors)
    monkeypatch.delattr(os, "memfd_create")
    with pytest.raises(OSError, match="no in-memory files"):
        SharedTensors(link).hold(tensors)
    assert [tensor.data_ptr() for tensor in tensors] == before
    assert open_files() == files


def test_a_folder_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        SharedTensors(tmp_path / "nowhere" / "weights").hold(some())


@pytest.mark.parametrize("selection", ["ranked", "input"])
@pytest.mark.parametrize("coupled", [True, False])
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "int8"])
def test_passes_that_share_answer_as_before(
    link: Path, selection: str, coupled: bool, precision: str
) -> None:
    def made() -> PackedPass:
        network = random_network(small_config(head_selection=selection, budget_ffn=coupled))
        return load_pass(network, precision, measure_ranges(network, [ITEMS]))

    def answer(one: PackedPass) -> Tensor:
        arrival = one.decide(ITEMS)
        steps = [one.config.num_steps] * 3
        return one.run(ITEMS, steps, arrival.exit_logits, arrival.ranking).logits

    alone, first, second = made(), made(), made()
    answer(first)  # what it has laid out by now is not shared
    for one in (first, second):
        one.free_model_weights()
        one.share(link)
    right = answer(alone)
    assert torch.equal(answer(first), right)
    assert torch.equal(answer(second), right)
    for one in (first, second):
        assert all(map(is_mapped, one._slices.weights))
        one.stop_sharing()
    assert second.nbytes < 2 * alone.nbytes
