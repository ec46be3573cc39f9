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
def test_it_behaves_as_a_sorted_list(operations: list[tuple[str, int]]) -> None:
    heap: Heap[int] = Heap()
    model: list[tuple[int, int]] = []
    for item, (operation, value) in enumerate(operations):
        match operation:
            case "push":
                heap.push(value, item)
                model.append((value, item))
            case "discard":
                there = [one for one in model if one[1] == value]
                assert heap.discard(value) == bool(there)
                model = [one for one in model if one not in there]
            case _ if model:
                assert heap.first() == min(model)
                assert heap.pop() == min(model)[1]
                model.remove(min(model))
        assert len(heap) == len(model)
        assert set(heap) == {item for _, item in model}


def test_an_item_that_comes_back_has_its_new_key_alone() -> None:
    heap: Heap[str] = Heap()
    heap.push(1.0, "a")
    heap.discard("a")
    heap.push(3.0, "a")
    heap.push(2.0, "b")
    assert [heap.pop(), heap.pop()] == ["b", "a"]


class Thing:
    """Something that is freed when nobody holds it."""


def test_discarded_items_are_freed_at_once() -> None:
    heap: Heap[Thing] = Heap()
    kept, given_up = Thing(), Thing()
    heap.push(0.0, kept)
    heap.push(1.0, given_up)
    freed = weakref.ref(given_up)
    heap.discard(given_up)
    del given_up
    assert freed() is None
    assert heap.pop() is kept


def test_what_is_left_of_discarded_items_is_bounded() -> None:
    heap: Heap[int] = Heap()
    heap.push(0.0, -1)
    for item in range(10_000):
        heap.push(1.0, item)
        heap.discard(item)
    assert len(heap._records) <= MIN_REBUILD + 1
