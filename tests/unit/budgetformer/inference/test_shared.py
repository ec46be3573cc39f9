"""Several passes, in several processes, share one copy of the weights in memory."""

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


def weights() -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(3, 5), torch.randn(7, 2).half(), torch.randn(1, 1).bfloat16()]


def mapping(tensor: Tensor) -> list[str]:
    """Return the fields of the line in /proc/self/maps whose range has the tensor."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        words = line.split(maxsplit=5)
        start, stop = (int(end, 16) for end in words[0].split("-"))
        if start <= tensor.data_ptr() < stop:
            return words
    raise AssertionError("the tensor is not mapped")


def is_mapped(tensor: Tensor) -> bool:
    """Return whether a tensor is in a mapped memory file."""
    return mapping(tensor)[-1].startswith("/memfd:weights")


def inode(tensors: list[Tensor]) -> str:
    """Return the inode of the file that tensors share."""
    (number,) = {mapping(tensor)[4] for tensor in tensors}
    return number


@pytest.fixture
def link(tmp_path: Path) -> Path:
    return tmp_path / "weights"


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_holders_map_equal_tensors_from_one_file(link: Path) -> None:
    first, second = weights(), weights()
    holders = [SharedTensors(link), SharedTensors(link)]
    for holder, tensors in zip(holders, (first, second), strict=True):
        before = [tensor.data_ptr() for tensor in tensors]
        holder.hold(tensors)
        for tensor, was, value in zip(tensors, before, weights(), strict=True):
            assert torch.equal(tensor, value)
            assert tensor.dtype == value.dtype
            assert tensor.data_ptr() != was
            assert tensor.data_ptr() % ALIGNMENT == 0
            assert is_mapped(tensor)
    assert inode(first) == inode(second)
    for holder in holders:
        holder.forget()


def test_tensors_stay_mapped_after_the_file_is_forgotten(link: Path) -> None:
    files, tensors, later = open_files(), weights(), weights()
    holder, other = SharedTensors(link), SharedTensors(link)
    holder.hold(tensors)
    holder.forget()
    assert not link.is_symlink()
    assert open_files() == files
    assert all(map(torch.equal, tensors, weights()))
    other.hold(later)
    assert inode(later) != inode(tensors)
    other.forget()
    other.forget()
    assert open_files() == files


def test_the_file_remains_while_another_holder_uses_it(link: Path) -> None:
    files, old, new, last = open_files(), weights(), weights(), weights()
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


def test_a_process_that_did_not_make_the_file_leaves_its_link(link: Path) -> None:
    held, read, write = weights(), *os.pipe()
    holder = SharedTensors(link)
    holder.hold(held)
    child = os.fork()
    if not child:  # forgets the inherited files, like a process that was started separately
        shared_file._files.clear()
        shared_file._users.clear()
        tensors, reader = weights(), SharedTensors(link)
        reader.hold(tensors)
        reader.forget()
        os.write(write, inode(tensors).encode())
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(read, 100).decode() == inode(held)
    assert link.exists()
    os.close(read)
    os.close(write)
    holder.forget()


def link_to_nothing(link: Path) -> None:
    link.symlink_to("/proc/0/fd/1")


def link_to_another_file(link: Path) -> None:
    (link.parent / "another").write_bytes(b"short")
    link.symlink_to(link.parent / "another")


def link_to_a_pipe(link: Path) -> None:
    os.mkfifo(link.parent / "pipe")
    link.symlink_to(link.parent / "pipe")


@pytest.mark.parametrize("make", [link_to_nothing, link_to_another_file, link_to_a_pipe])
def test_a_stale_link_is_replaced(link: Path, make: Callable[[Path], None]) -> None:
    make(link)
    tensors, holder = weights(), SharedTensors(link)
    holder.hold(tensors)
    assert is_mapped(tensors[0])
    assert all(map(torch.equal, tensors, weights()))
    holder.forget()


def test_a_tensor_that_differs_is_not_shared(link: Path) -> None:
    holder, other = SharedTensors(link), SharedTensors(link)
    others = weights()
    holder.hold(weights())
    others[0][0, 0] += 1
    kept = others[0].clone()
    other.hold(others)
    assert torch.equal(others[0], kept)
    assert not is_mapped(others[0])
    assert is_mapped(others[1])
    holder.forget()


def no_memory(_: str) -> int:
    raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))


def test_without_memory_files_tensors_stay_unchanged(
    link: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files, tensors = open_files(), weights()
    before = [tensor.data_ptr() for tensor in tensors]
    monkeypatch.setattr(os, "memfd_create", no_memory)
    with pytest.raises(OSError, match="Cannot allocate"):
        SharedTensors(link).hold(tensors)
    monkeypatch.delattr(os, "memfd_create")
    with pytest.raises(OSError, match="no in-memory files"):
        SharedTensors(link).hold(tensors)
    assert [tensor.data_ptr() for tensor in tensors] == before
    assert open_files() == files


def test_a_missing_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        SharedTensors(tmp_path / "nowhere" / "weights").hold(weights())


@pytest.mark.parametrize("selection", ["ranked", "input"])
@pytest.mark.parametrize("coupled", [True, False])
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "int8"])
def test_sharing_does_not_change_answers(
    link: Path, selection: str, coupled: bool, precision: str
) -> None:
    def new_pass() -> PackedPass:
        network = random_network(small_config(head_selection=selection, budget_ffn=coupled))
        return load_pass(network, precision, measure_ranges(network, [ITEMS]))

    def answer(compact: PackedPass) -> Tensor:
        decision = compact.decide(ITEMS)
        steps = [compact.config.num_steps] * 3
        return compact.run(ITEMS, steps, decision.exit_logits, decision.ranking).logits

    alone, first, second = new_pass(), new_pass(), new_pass()
    answer(first)  # weights that it packs before sharing are not shared
    for compact in (first, second):
        compact.free_model_weights()
        compact.share(link)
    expected = answer(alone)
    assert torch.equal(answer(first), expected)
    assert torch.equal(answer(second), expected)
    for compact in (first, second):
        assert all(map(is_mapped, compact._slices.weights))
        compact.stop_sharing()
    assert second.nbytes < 2 * alone.nbytes
