"""Print the accuracy of step 0 alone against the size of its table.

`python step0_sizes.py DATA_FOLDER [TOKENS]`: the folder has train and test files as for
`budgetformer train`; step 0 reads at most TOKENS tokens of a text. As in training, a tenth of the
training texts is held out.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer

from budgetformer.model.configuration import BudgetFormerConfig
from budgetformer.training.data import Examples, TokenizedTexts, read_examples
from budgetformer.training.exits import wrong
from budgetformer.training.pipeline import find_data, find_start
from budgetformer.training.recipe import Recipe
from budgetformer.training.step0 import fit_step0
from budgetformer.training.trainer import split_rows

SIZES = (0, 2**17, 2**19, 2**20, 2**21)
"""Weights in the table for pairs of neighbouring tokens."""


def main(data: str, tokens: int = 4096) -> None:
    train_file, test_file = find_data(Path(data))
    assert test_file is not None
    examples = read_examples(train_file)
    test = read_examples(test_file, examples.names, multi_label=examples.multi_label)
    recipe = Recipe()
    kept, _ = split_rows(len(examples), recipe.hold_out, recipe.seed)
    train = examples.subset(kept)
    folder = find_start("minilm-l6").folder
    assert folder is not None
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))

    def tokenized(examples: Examples) -> TokenizedTexts:
        return TokenizedTexts(tokenizer, examples.texts, examples.pairs, tokens)

    seen, unseen = tokenized(train), tokenized(test)
    print("| weights for pairs | table, MB | out of fold | test |\n|---|---|---|---|")
    for size in SIZES:
        config = BudgetFormerConfig(
            vocab_size=tokenizer.get_vocab_size(),
            num_labels=len(train.names),
            embedding_exit=True,
            exit_tfidf=True,
            exit_buckets=size // (1 if len(train.names) == 2 else len(train.names)),
        )
        head, out_of_fold = fit_step0(config, seen, train, recipe)
        test_logits = []
        for ids, types in zip(unseen.ids, unseen.types, strict=True):
            input_ids, type_ids = torch.from_numpy(ids)[None], torch.from_numpy(types)[None]
            test_logits.append(head(input_ids, torch.ones_like(input_ids), type_ids))
        errors = (
            wrong(logits, torch.from_numpy(labels), config.problem_type).mean()
            for logits, labels in (
                (out_of_fold, train.labels),
                (torch.cat(test_logits), test.labels),
            )
        )
        megabytes = (head.table.nbytes + head.idf.nbytes) / 1e6
        print(f"| {size:,} | {megabytes:.2f} |", " | ".join(f"{1 - e:.4f}" for e in errors), "|")


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:3]))
