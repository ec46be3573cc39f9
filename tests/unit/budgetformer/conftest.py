from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from tokenizers import Tokenizer

from tests.support.texts import small_tokenizer


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Run torch on one thread: fastest for small networks, and bit by bit repeatable."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def _tokenizer_text() -> str:
    return small_tokenizer().to_str()


@pytest.fixture
def tokenizer(_tokenizer_text: str) -> Tokenizer:
    """Return a new small tokenizer, because data sets change its truncation."""
    return Tokenizer.from_str(_tokenizer_text)
