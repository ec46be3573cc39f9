"""Load the tokenizer in an encoder's folder with Transformers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import AutoTokenizer

from budgetformer.errors import CheckpointError, one_line
from budgetformer.model.architecture import Architecture
from budgetformer.model.encoder import SequenceClassifier
from budgetformer.model.modeling import silence_transformers
from budgetformer.tokenization import Side

_NO_LIMIT = 10**9
"""A `model_max_length` above this means no limit (Transformers writes 1e30)."""


@dataclass(frozen=True)
class SourceTokenizer:
    """A tokenizer with the settings of its Transformers files.

    Attributes:
        tokenizer: tokenizer without padding and truncation.
        max_tokens: longest input, including special tokens; None: the encoder's positions.
        side: the end at which longer inputs are truncated.
        has_types: whether Transformers passes its token types to the network.
    """

    tokenizer: Tokenizer
    max_tokens: int | None
    side: Side
    has_types: bool

    def longest(self, config: Architecture) -> int:
        """Return the longest input of both tokenizer and encoder, including special tokens."""
        positions = config.max_position_embeddings
        return min(self.max_tokens or positions, positions)

    def match_token_types(self, model: SequenceClassifier) -> None:
        """Give both token types one embedding if the tokenizer returns no token types.

        Transformers then passes no types, so both texts of a pair have type 0.
        """
        if not self.has_types:
            types = model.encoder.embeddings.segment.weight.data
            types[1:] = types[0]


def read_tokenizer(folder: Path) -> SourceTokenizer:
    """Load the tokenizer in a folder.

    Without `tokenizer.json`, Transformers builds a fast tokenizer from `vocab.txt` or SentencePiece
    files. If `tokenizer_config.json` and `tokenizer.json` differ, for example in casing, the former
    is used.

    Raises:
        CheckpointError: the folder has no tokenizer, or only a slow one.
    """
    try:
        with silence_transformers():
            loaded: Any = AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
    except Exception as error:  # Transformers and tokenizers raise many types
        reason = one_line(error)[:200] or type(error).__name__
        raise CheckpointError(
            f"{folder}: Transformers cannot load its tokenizer: {reason}"
        ) from None
    if not getattr(loaded, "is_fast", False):
        raise CheckpointError(
            f"{folder}: its tokenizer ({type(loaded).__name__}) is not a fast one; "
            "convert it with PreTrainedTokenizerFast and save it"
        )
    if len(loaded) <= len(loaded.all_special_tokens):  # Transformers' result for missing files
        raise CheckpointError(
            f"{folder}: no tokenizer files; save the one that the model was trained with there"
        )
    tokenizer = Tokenizer.from_str(loaded.backend_tokenizer.to_str())
    tokenizer.no_padding()
    tokenizer.no_truncation()
    limit = int(min(loaded.model_max_length, _NO_LIMIT))
    return SourceTokenizer(
        tokenizer,
        None if limit >= _NO_LIMIT else limit,
        "left" if loaded.truncation_side == "left" else "right",
        "token_type_ids" in loaded.model_input_names,
    )


def check_tokenizer(tokenizer: Tokenizer, config: Architecture, folder: Path | None) -> None:
    """Check that every token id and token type has a row in the embeddings.

    Raises:
        CheckpointError: an id or a type is out of range.
    """
    top = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
    if top >= config.vocab_size:
        raise CheckpointError(
            f"{folder}: the tokenizer has token ids up to {top}, "
            f"but the encoder's vocab_size is {config.vocab_size}"
        )
    types = max(tokenizer.encode("a", "b").type_ids, default=0)
    if types >= config.type_vocab_size:
        raise CheckpointError(
            f"{folder}: the tokenizer has token types up to {types}, "
            f"but the encoder's type_vocab_size is {config.type_vocab_size}"
        )
