"""Train a small network in the processes that `torchrun` started, and save its weights."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

from budgetformer.model.configuration import BudgetFormerConfig
from budgetformer.model.modeling import BudgetFormerForSequenceClassification
from budgetformer.training.data import TokenizedTexts
from budgetformer.training.processes import join_processes
from budgetformer.training.recipe import Recipe
from budgetformer.training.trainer import Trainer
from tests.support.texts import topic_examples

SIZES = {
    "vocab_size": 150,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 32,
    "max_position_embeddings": 16,
    "num_labels": 3,
    "initializer_range": 0.2,
    # Its noise would be another for each part of a batch.
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
RECIPE = Recipe(max_length=16, batch_size=12, learning_rate=1e-3, ladder="importance")


def train(folder: Path, tokenizer: Path) -> dict[str, Tensor]:
    """Train with a last batch of one text, which has no part for a second process."""
    processes, device = join_processes(torch.device("cpu"))
    torch.manual_seed(processes.index)  # the processes agree on the first one's weights
    model = BudgetFormerForSequenceClassification(BudgetFormerConfig(**SIZES))
    examples = topic_examples().subset(range(49))
    tokens = TokenizedTexts(Tokenizer.from_file(str(tokenizer)), examples.texts, None, 16)
    Trainer(
        *(model, tokens, examples, RECIPE, folder, print), device=device, processes=processes
    ).train()
    return {name: weight.contiguous() for name, weight in model.state_dict().items()}


if __name__ == "__main__":
    folder, tokenizer, output = map(Path, sys.argv[1:])
    weights = train(folder, tokenizer)
    save_file(weights, output.with_suffix(f".{join_processes(torch.device('cpu'))[0].index}"))
