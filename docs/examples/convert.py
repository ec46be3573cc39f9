"""Convert a fine-tuned BERT and calibrate it on other texts: `python convert.py FOLDER`.

The texts are made from templates, so that nothing is downloaded; replace them by your own.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

CLASSES = {
    "complaint": ["never arrived", "came broken", "was the wrong size", "stopped working"],
    "praise": ["works very well", "arrived early", "is just what I wanted", "looks lovely"],
    "question": ["how do I return it", "when will it ship", "does it fit", "is there a manual"],
}
THINGS = ["lamp", "kettle", "jacket", "radio", "chair", "phone"]
RECIPE = """
max_length = 32
dense_epochs = 1
budget_epochs = 3
exit_weights = 300
batch_size = 32
learning_rate = 5e-4
"""


def make_texts(path: Path, count: int, seed: int) -> list[dict[str, str]]:
    """Write labelled texts, one JSON object per line."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        label = rng.choice(list(CLASSES))
        thing, statement = rng.choice(THINGS), rng.choice(CLASSES[label])
        rows.append(
            {"text": f"The {thing}: {statement}, order {rng.randrange(999)}.", "label": label}
        )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def fine_tune(rows: list[dict[str, str]], folder: Path) -> None:
    """Fine-tune a small BERT in plain Transformers, in place of your own encoder."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer.train_from_iterator(
        [row["text"] for row in rows],
        trainers.WordPieceTrainer(vocab_size=300, special_tokens=special, show_progress=False),
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        "[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", [("[CLS]", 2), ("[SEP]", 3)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=32, pad_token="[PAD]", unk_token="[UNK]",
        cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]",
    )  # fmt: skip
    names = sorted(CLASSES)
    torch.manual_seed(0)
    model = BertForSequenceClassification(
        BertConfig(
            vocab_size=tokenizer.get_vocab_size(), hidden_size=64, num_hidden_layers=2,
            num_attention_heads=4, intermediate_size=128, max_position_embeddings=32,
            id2label=dict(enumerate(names)), label2id={name: i for i, name in enumerate(names)},
        )
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for start in range(0, len(rows), 32):
        batch = rows[start : start + 32]
        inputs = fast([row["text"] for row in batch], padding=True, return_tensors="pt")
        labels = torch.tensor([names.index(row["label"]) for row in batch])
        model(**inputs, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    fast.save_pretrained(folder)


def budgetformer(*arguments: str | Path) -> None:
    """Run a `budgetformer` command, and print it first."""
    print("$ budgetformer", *arguments, flush=True)
    subprocess.run([sys.executable, "-m", "service.cli", *map(str, arguments)], check=True)


def main(folder: str) -> None:
    root = Path(folder)
    (root / "texts").mkdir(parents=True, exist_ok=True)
    rows = make_texts(root / "texts" / "train.jsonl", 1500, seed=1)
    make_texts(root / "texts" / "test.jsonl", 300, seed=2)
    make_texts(root / "mine.jsonl", 400, seed=3)
    fine_tune(rows, root / "encoder")
    (root / "recipe.toml").write_text(RECIPE)
    imported, recalibrated = (root / "store" / "orders" / version for version in ("1", "2"))
    budgetformer(
        "import", root / "encoder", "--data", root / "texts", "--out", imported,
        "--recipe", root / "recipe.toml", "--threads", "1",
    )  # fmt: skip
    mine, test = root / "mine.jsonl", root / "texts" / "test.jsonl"
    budgetformer("calibrate", "--data", mine, "--model", imported, "--out", recalibrated)
    budgetformer("evaluate", "--data", test, "--model", recalibrated)


if __name__ == "__main__":
    main(*sys.argv[1:])
