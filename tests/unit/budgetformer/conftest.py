from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from tokenizers import Tokenizer

from tests.support.texts import small_tokenizer


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Keep these small networks on one thread, where they are fastest and repeat bit by bit."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def _tokenizer_text() -> str:
    return small_tokenizer().to_str()


@pytest.fixture
def tokenizer(_tokenizer_text: str) -> Tokenizer:
    """Return a fresh small tokenizer; the data set changes its truncation."""
    return Tokenizer.from_str(_tokenizer_text)
