"""Train a small network in the processes that `torchrun` started, and save its weights.

Run as a module by the tests of training in several processes.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

from budgetformer.training.data import TokenizedTexts
from budgetformer.training.processes import join_processes
from budgetformer.training.recipe import Recipe
from budgetformer.training.trainer import Trainer
from tests.support.networks import new_network
from tests.support.texts import topic_examples

# The noise of dropout would differ between the parts of a batch.
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
RECIPE = Recipe(max_length=16, batch_size=12, learning_rate=1e-3, ladder="importance")


def train(folder: Path, tokenizer: Path) -> dict[str, Tensor]:
    """Train and return the weights; the last batch has one text, so none for a second process."""
    processes, device = join_processes(torch.device("cpu"))
    # Each process begins with other weights; training uses those of the first process.
    model = new_network(seed=processes.index, **NO_DROPOUT)
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
