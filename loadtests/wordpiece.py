"""Compare WordPiece packages with `tokenizers`: whether ids are equal, and the time.

    python loadtests/wordpiece.py model_store/ag_news/3/tokenizer.json TEXTS.parquet...

Run it in a separate environment with `tokenizers`, `pyarrow` and the packages to compare. It counts
texts whose ids differ, among the first 3,000 texts of each file and 20,000 random texts of many
scripts, special tokens and very long words. It prints the processor time per text in microseconds,
one text per call and 64 per call, in one thread: the median of several turns, each with other
texts.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version

os.environ |= {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1"}

Ids = list[int]
Encode = Callable[[list[str]], list[Ids]]
TURNS, TEXTS, BATCH = 9, 320, 64
SCRIPTS = [
    (0x00, 0x7F), (0x80, 0x24F), (0x300, 0x36F), (0x370, 0x5FF), (0x600, 0x6FF), (0x900, 0x97F),
    (0x2000, 0x206F), (0x3040, 0x30FF), (0x4E00, 0x9FFF), (0xAC00, 0xD7A3), (0xE000, 0xE0FF),
    (0xF900, 0xFEFF), (0x1F300, 0x1F6FF), (0x20000, 0x2A6DF),
]  # fmt: skip
PIECES = [" ", "\t", "\0", "\u200d", "\ufffd", "[CLS]", "[MASK]", "a" * 99, "a" * 101]


def tokenizers(file: str) -> Encode:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(file)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return lambda texts: [encoding.ids for encoding in tokenizer.encode_batch_fast(texts)]


def fastokens(file: str) -> Encode:
    from fastokens import Tokenizer

    tokenizer = Tokenizer.from_file(file)
    return lambda texts: tokenizer.encode_batch(texts, add_special_tokens=True)


def flash_tokenizer(file: str) -> Encode:
    from flash_tokenizer import BertTokenizerFlash
    from tokenizers import Tokenizer

    words = Tokenizer.from_file(file).get_vocab()
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as lines:
        lines.write("\n".join(sorted(words, key=words.__getitem__)) + "\n")
        lines.flush()
        tokenizer = BertTokenizerFlash(lines.name, do_lower_case=True, model_max_length=10**6)
    return lambda texts: [
        tokenizer(text, padding="longest", max_length=10**6).input_ids[0] for text in texts
    ]


def kitoken(file: str) -> Encode:
    from kitoken import Kitoken

    tokenizer = Kitoken.from_tokenizers_file(file)
    first, last = tokenizers(file)([""])[0]
    return lambda texts: [[first, *ids, last] for ids in tokenizer.encode_all(texts, True)]


def morpheme(file: str) -> Encode:
    from morpheme import Tokenizer

    tokenizer = Tokenizer.from_file(file)
    return lambda texts: [encoding.ids for encoding in tokenizer.encode_batch(texts)]


def nanotoken(file: str) -> Encode:
    from nanotoken import Tokenizer

    tokenizer = Tokenizer(file)
    return lambda texts: tokenizer.encode_batch(texts, parallel=False).to_list()


def tokie(file: str) -> Encode:
    from tokie import Tokenizer

    tokenizer = Tokenizer.from_json(file)
    return lambda texts: [encoding.ids for encoding in tokenizer.encode_batch(texts)]


PACKAGES = [tokenizers, fastokens, flash_tokenizer, kitoken, morpheme, nanotoken, tokie]


def odd_text(generator: random.Random) -> str:
    drawn = []
    for _ in range(generator.randint(1, 60)):
        drawn.append(chr(generator.randint(*generator.choice(SCRIPTS))))
        if generator.random() < 0.2:
            drawn.append(generator.choice(PIECES))
    return "".join(drawn)


def count_differences(encode: Encode, reference: Encode, texts: list[str]) -> int:
    return sum(list(encode([text])[0]) != reference([text])[0] for text in texts)


def microseconds(encode: Encode, texts: list[str], size: int) -> float:
    turns = []
    for turn in range(TURNS):
        of_turn = texts[turn * TEXTS : (turn + 1) * TEXTS]
        parts = [of_turn[at : at + size] for at in range(0, TEXTS, size)]
        began = time.process_time()
        for part in parts:
            encode(part)
        turns.append(time.process_time() - began)
    return statistics.median(turns) / TEXTS * 1e6


def main() -> None:
    import pyarrow.parquet as parquet

    parser = argparse.ArgumentParser()
    parser.add_argument("tokenizer")
    parser.add_argument("files", nargs="+")
    given = parser.parse_args()
    files = {name: parquet.read_table(name)["text"].to_pylist() for name in given.files}
    odd = [odd_text(random.Random(seed)) for seed in range(20_000)]
    reference = tokenizers(given.tokenizer)
    for load in PACKAGES:
        name = load.__name__.replace("_", "-")
        try:
            encode = load(given.tokenizer)
        except ImportError:
            continue
        except Exception as error:
            print(f"{name} {version(name)}: {error}")
            continue
        for file, texts in files.items():
            single = microseconds(encode, texts[3000:], 1)
            batched = microseconds(encode, texts[3000 + TURNS * TEXTS :], BATCH)
            times = f"{single:.1f} us per text, {batched:.1f} us in batches of {BATCH}"
            count = count_differences(encode, reference, texts[:3000])
            print(f"{name} {version(name)}, {file}: {times}; different ids: {count} of 3000")
        count = count_differences(encode, reference, odd)
        print(f"{name} {version(name)}, random texts: different ids: {count} of 20000")


if __name__ == "__main__":
    main()
