"""The heap with removal of any item."""

from __future__ import annotations

import weakref

from hypothesis import given, settings
from hypothesis import strategies as st

from service.scheduling.heap import MIN_REBUILD, Heap

PROPERTY = settings(max_examples=100, deadline=None, derandomize=True, database=None)


@PROPERTY
@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("push"), st.integers(0, 5)),
            st.tuples(st.just("discard"), st.integers(0, 60)),
            st.tuples(st.just("pop"), st.just(0)),
        ),
        max_size=120,
    )
)
def test_behaves_like_a_sorted_list(operations: list[tuple[str, int]]) -> None:
    heap: Heap[int] = Heap()
    model: list[tuple[int, int]] = []
    for item, (operation, value) in enumerate(operations):
        match operation:
            case "push":
                heap.push(value, item)
                model.append((value, item))
            case "discard":
                matching = [pair for pair in model if pair[1] == value]
                assert heap.discard(value) == bool(matching)
                model = [pair for pair in model if pair not in matching]
            case _ if model:
                assert heap.first() == min(model)
                assert heap.pop() == min(model)[1]
                model.remove(min(model))
        assert len(heap) == len(model)
        assert set(heap) == {item for _, item in model}


def test_an_item_pushed_again_has_only_its_new_key() -> None:
    heap: Heap[str] = Heap()
    heap.push(1.0, "a")
    heap.discard("a")
    heap.push(3.0, "a")
    heap.push(2.0, "b")
    assert [heap.pop(), heap.pop()] == ["b", "a"]


class Thing:
    """An object that a weak reference can observe."""


def test_discarded_items_are_freed_at_once() -> None:
    heap: Heap[Thing] = Heap()
    kept, discarded = Thing(), Thing()
    heap.push(0.0, kept)
    heap.push(1.0, discarded)
    reference = weakref.ref(discarded)
    heap.discard(discarded)
    del discarded
    assert reference() is None
    assert heap.pop() is kept


def test_records_of_discarded_items_are_bounded() -> None:
    heap: Heap[int] = Heap()
    heap.push(0.0, -1)
    for item in range(10_000):
        heap.push(1.0, item)
        heap.discard(item)
    assert len(heap._records) <= MIN_REBUILD + 1
