"""Classify many texts over HTTP during faults, and compare all answers with the reference.

    python -m loadtests.answers [--texts 100000] [--data texts.parquet] [--reference build/answers]

The reference is the network of `budgetformer.model`, which computes all heads and masks some. It
runs in this process first, and its answers are cached in a file. Then all texts are sent to a
server with two engines and two frontends, in concurrent requests of 1 to 64 texts, while its
processes are killed and stopped, its models are changed, and clients disconnect and retry. Broken
and refused requests are repeated. Each text must be answered exactly once, with the right label,
probabilities and ladder step. Texts so close to a threshold that rounding may decide are counted
separately. The exit code is 1 if any answer was wrong, lost or duplicated.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import itertools
import random
import signal
import sys
import time
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import torch
from numpy.typing import NDArray
from torch import Tensor

from budgetformer.checkpoint.store import Checkpoint, load_encoder, read_store
from budgetformer.model.answers import confidence, probabilities
from budgetformer.model.embeddings import masked_mean
from budgetformer.model.modeling import BudgetFormerForSequenceClassification, load_model
from budgetformer.tables import read_texts
from loadtests.chaos.server import MODEL, OTHER, PATIENCE, STORE, Server, serving
from loadtests.texts import distinct

QUALITIES = ("fast", "balanced", "best")
"""Quality levels, requested in turns; `auto` would depend on the load."""
TOLERANCE = 1e-4
"""Accepted difference of a probability: float32 sums in another order."""
TIE_MARGIN = 1e-4
"""Distance from a threshold within which rounding may decide."""
SIZES = (1, 1, 1, 2, 5, 16, 64)
"""Texts per request, drawn uniformly from this list."""
CALLERS = 12
LEAVING = 0.02
"""Share of the requests whose client disconnects before the answer, and then sends it again."""
REST_SECONDS = 4.0
BATCH_TOKENS = 2048
PART = 6000
"""Texts per file of the reference; a multiple of the number of qualities."""


@dataclass(frozen=True)
class Reference:
    """The expected answers: probs [N, C], final step [N], distance from a threshold [N]."""

    probs: NDArray[np.float32]
    steps: NDArray[np.int16]
    margins: NDArray[np.float32]


class _ReferenceNetwork:
    """The network of `budgetformer.model`, run at every step that an answer needs."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._network: BudgetFormerForSequenceClassification = load_model(checkpoint.path).eval()
        self._kind = checkpoint.manifest.problem_type
        self._rules = [checkpoint.rule(quality) for quality in QUALITIES]
        self._encoder = load_encoder(checkpoint)

    @torch.no_grad()
    def answer(self, texts: list[str]) -> Reference:
        """Answer all texts, in small batches of similar lengths."""
        encoded = self._encoder.encode(texts)
        ids = [tokens.ids for tokens in encoded]
        full_texts = [tokens.full_ids or tokens.ids for tokens in encoded]
        rules = [self._rules[i % len(QUALITIES)] for i in range(len(ids))]
        logits: list[Tensor] = [torch.empty(0)] * len(ids)
        steps, margins = [0] * len(ids), [1.0] * len(ids)
        shares = [0.0] * len(ids)
        step0: list[tuple[Tensor, Tensor]] = [(torch.empty(0), torch.empty(0))] * len(ids)
        for batch in _batches(full_texts, range(len(ids))):
            exits, evidence = self._network.step0(*_padded(full_texts, batch))
            decided = self._decide(*_padded(ids, batch), evidence)
            for i, s, exit_logits, read in zip(batch, decided, exits, evidence, strict=True):
                step0[i] = exit_logits, read
                steps[i], logits[i], shares[i] = rules[i].first_step(s), exit_logits, s
                bounds = [band.upto for band in rules[i].entry if band.upto < 1]
                margins[i] = min((abs(s - bound) for bound in bounds), default=1.0)
        waiting = list(range(len(ids)))
        while waiting:
            for step in {steps[i] for i in waiting} - {0}:
                for batch in _batches(ids, [i for i in waiting if steps[i] == step]):
                    exits, evidence = map(torch.stack, zip(*(step0[i] for i in batch), strict=True))
                    answers = self._network(
                        *_padded(ids, batch), steps=step, step0=(exits, evidence)
                    ).logits
                    for i, row in zip(batch, answers, strict=True):
                        logits[i] = row
            confident = confidence(torch.stack([logits[i] for i in waiting]), self._kind).tolist()
            uncertain = []
            for i, score in zip(waiting, confident, strict=True):
                level = rules[i].level
                if level is not None and rules[i].next_step(steps[i], 0.0, shares[i]):
                    margins[i] = min(margins[i], abs(score - level.threshold))
                following = rules[i].next_step(steps[i], score, shares[i])
                if following is not None:
                    steps[i] = following
                    uncertain.append(i)
            waiting = uncertain
        return Reference(
            probabilities(torch.stack(logits), self._kind).numpy(),
            np.array(steps, np.int16),
            np.array(margins, np.float32),
        )

    def _decide(self, ids: Tensor, mask: Tensor, evidence: Tensor) -> list[float]:
        """Return f_o's s [B], as the network's forward does."""
        encoder = self._network.encoder
        assert encoder.decision is not None
        states = encoder.embed(ids, None)
        shares: list[float] = encoder.decision(
            masked_mean(states, mask), None, evidence
        ).budget.tolist()
        return shares


def _batches(ids: list[list[int]], indices: Iterable[int]) -> Iterator[list[int]]:
    """Split text indices into batches of similar lengths."""
    batch: list[int] = []
    for index in sorted(indices, key=lambda i: len(ids[i])):
        if batch and (len(batch) + 1) * len(ids[index]) > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def _padded(ids: list[list[int]], batch: list[int]) -> tuple[Tensor, Tensor]:
    """Return the ids and the mask of a batch of texts, [B, T] each."""
    width = max(len(ids[i]) for i in batch)
    rows = torch.tensor([ids[i] + [0] * (width - len(ids[i])) for i in batch])
    mask = torch.tensor([[1] * len(ids[i]) + [0] * (width - len(ids[i])) for i in batch])
    return rows, mask


def reference(checkpoint: Checkpoint, texts: list[str], folder: Path) -> Reference:
    """Return the expected answers, each part from its file or computed and saved there."""
    folder.mkdir(parents=True, exist_ok=True)
    network: _ReferenceNetwork | None = None
    parts = []
    for start in range(0, len(texts), PART):
        part = texts[start : start + PART]
        key = "\0".join([checkpoint.manifest.model_dump_json(), *QUALITIES, *part])
        path = folder / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.npz"
        if not path.exists():
            network = network or _ReferenceNetwork(checkpoint)
            right = network.answer(part)
            np.savez(path, probs=right.probs, steps=right.steps, margins=right.margins)
            print(f"{start + len(part):,} texts answered", file=sys.stderr, flush=True)
        with np.load(path) as saved:
            parts.append((saved["probs"], saved["steps"], saved["margins"]))
    return Reference(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


@dataclass
class Received:
    """The received answers to N texts.

    Attributes:
        times: number of answers to each text, [N].
        probs: probabilities, [N, C].
        steps: final ladder steps, [N].
        labels: labels, by text.
        repeated: failed requests, which were sent again, by reason.
        requests: number of requests sent.
        foreign: answers to another request, or with missing or reordered texts.
        hung: number of requests that were never answered.
        faults: number of injected faults, by kind.
    """

    times: NDArray[np.int16]
    probs: NDArray[np.float32]
    steps: NDArray[np.int16]
    labels: list[str]
    repeated: Counter[str] = field(default_factory=Counter)
    requests: int = 0
    foreign: int = 0
    hung: int = 0
    faults: Counter[str] = field(default_factory=Counter)


class Callers:
    """The concurrent clients."""

    def __init__(self, server: Server, texts: list[str], classes: int) -> None:
        count = len(texts)
        self.received = Received(
            np.zeros(count, np.int16),
            np.zeros((count, classes), np.float32),
            np.zeros(count, np.int16),
            [""] * count,
        )
        self._server = server
        self._texts = texts
        self._draw = random.Random(1)
        self._left: dict[str, list[int]] = {}
        for number, quality in enumerate(QUALITIES):  # a request has one quality
            indices = list(range(number, count, len(QUALITIES)))
            self._draw.shuffle(indices)
            self._left[quality] = indices

    async def run(self) -> None:
        """Send requests until every text is answered."""
        async with httpx.AsyncClient(base_url=self._server.url, timeout=PATIENCE) as client:
            await asyncio.gather(*(self._caller(client) for _ in range(CALLERS)))

    async def _caller(self, client: httpx.AsyncClient) -> None:
        while indices := self._take():
            quality = QUALITIES[indices[0] % len(QUALITIES)]
            while not await self._ask(client, indices, quality):
                await asyncio.sleep(0.1)

    def _take(self) -> list[int]:
        """Return the indices of the texts of the next request; empty if none are left."""
        waiting = [q for q in QUALITIES if self._left[q]]
        if not waiting:
            return []
        left = self._left[self._draw.choice(waiting)]
        size = self._draw.choice(SIZES)
        taken = left[-size:]
        del left[-size:]
        if not len(left) % 1000:
            print(f"{sum(map(len, self._left.values())):,} texts left", file=sys.stderr)
        return taken

    async def _ask(self, client: httpx.AsyncClient, indices: list[int], quality: str) -> bool:
        """Send one request, and return whether it was answered."""
        request_id = uuid.uuid4().hex
        texts = [self._texts[i] for i in indices]
        body = {"input": texts, "model": MODEL, "quality": quality, "timeout_ms": 30_000}
        headers = {"X-Request-Id": request_id}
        leaves = self._draw.random() < LEAVING
        self.received.requests += 1
        try:
            async with asyncio.timeout(self._draw.uniform(0, 0.05) if leaves else None):
                answer = await client.post("/classify", json=body, headers=headers)
        except TimeoutError:
            self.received.repeated["left"] += 1
            return False
        except httpx.TimeoutException:
            self.received.hung += 1
            return False
        except httpx.TransportError:
            self.received.repeated["broke off"] += 1
            return False
        if answer.status_code != 200:
            self.received.repeated[str(answer.status_code)] += 1
            return False
        self._record(answer.json(), request_id, indices)
        return True

    def _record(self, answer: dict[str, Any], request_id: str, indices: list[int]) -> None:
        received, items = self.received, answer["data"]
        complete = [item["index"] for item in items] == list(range(len(indices)))
        if answer["id"] != f"classify-{request_id}" or not complete:
            received.foreign += 1
        for index, item in zip(indices, items, strict=False):
            received.times[index] += 1
            received.probs[index] = item["probs"]
            received.steps[index] = item["heads"]["budget"]
            received.labels[index] = item["label"]


async def inject_faults(server: Server, faults: Counter[str]) -> None:
    """Cause one fault after another, until cancelled."""
    for turn in itertools.count():
        await asyncio.sleep(REST_SECONDS)
        kind = ("engine", "frontend")[turn // 3 % 2]
        if turn % 3 == 2:
            for action, name in (("load", MODEL), ("unload", OTHER), ("load", OTHER)):
                (await server.change(action, name)).raise_for_status()
                faults["changes of models"] += 1
        else:
            stops = turn % 12 == 0
            victim: psutil.Process = server.processes(kind)[0]
            victim.send_signal(signal.SIGSTOP if stops else signal.SIGKILL)
            faults["stopped" if stops else "killed"] += 1
            while stops and victim.is_running():
                await asyncio.sleep(0.1)
            await asyncio.sleep(0.1)
            await server.until_whole()


async def ask(texts: list[str], classes: int) -> tuple[Received, float]:
    """Send all texts to a server during faults; return the received answers and the seconds."""
    async with serving() as server:
        callers = Callers(server, texts, classes)
        breaking = asyncio.create_task(inject_faults(server, callers.received.faults))
        started = time.perf_counter()
        asking = asyncio.create_task(callers.run())
        await asyncio.wait({asking, breaking}, return_when=asyncio.FIRST_COMPLETED)
        seconds = time.perf_counter() - started
        await asking if asking.done() else await breaking
        breaking.cancel()
        await server.until_whole()
        return callers.received, seconds


def compare(
    received: Received, right: Reference, labels: tuple[str, ...]
) -> tuple[list[str], bool]:
    """Return the table, and whether all answers are correct."""
    differences = np.abs(received.probs - right.probs).max(axis=1)
    moved = received.steps != right.steps
    ties = moved & (right.margins < TIE_MARGIN)
    best = np.sort(right.probs, axis=1)
    even = best[:, -1] - best[:, -2] < TOLERANCE
    named = np.array([labels[i] for i in right.probs.argmax(axis=1)]) == np.array(received.labels)
    wrong = ~ties & (moved | (differences > TOLERANCE) | ~(named | even))
    swapped = np.array(
        [(np.abs(right.probs - received.probs[i]).max(axis=1) <= TOLERANCE).any()
         for i in np.flatnonzero(wrong)[:1000]]
    )  # fmt: skip
    draw = np.random.default_rng(0)
    one, other = (draw.integers(0, len(differences), 100_000) for _ in range(2))
    alike = np.abs(right.probs[one] - right.probs[other]).max(axis=1) <= TOLERANCE
    lost, twice = int((received.times == 0).sum()), int((received.times > 1).sum())
    steps = Counter(received.steps.tolist())
    rows = {
        "texts": f"{len(differences):,}",
        "requests": f"{received.requests:,}",
        "repeated after: " + ", ".join(sorted(received.repeated)): ", ".join(
            f"{count:,}" for _, count in sorted(received.repeated.items())
        ),
        "faults": ", ".join(f"{count} {name}" for name, count in sorted(received.faults.items())),
        "lost": lost,
        "answered twice": twice,
        "answers to another request": received.foreign,
        "not answered within 60 s": received.hung,
        "wrong": int(wrong.sum()),
        "of these, another text's answer": int(swapped.sum()),
        "ties, decided differently by rounding": int(ties.sum()),
        "largest difference of a probability, without ties": f"{differences[~ties].max():.1e}",
        "pairs of texts whose answers are too similar to notice a swap": (
            f"{alike[one != other].mean():.2%}"
        ),
        "answered at step": ", ".join(f"{step}: {n:,}" for step, n in sorted(steps.items())),
    }
    bad = lost + twice + received.foreign + received.hung + int(wrong.sum())
    return [f"| {name} | {value} |" for name, value in rows.items()], not bad


def _texts(arguments: argparse.Namespace, checkpoint: Checkpoint) -> list[str]:
    """Return distinct texts: those of the given table first, then random ones."""
    real: list[str] = []
    if arguments.data is not None:
        texts, _ = read_texts(arguments.data)
        real = list(dict.fromkeys(texts))[: arguments.texts]
    vocabulary = load_encoder(checkpoint).tokenizer.get_vocab()
    words = sorted(word for word in vocabulary if word.isalpha() and len(word) > 2)
    made = distinct(arguments.texts, arguments.seed, words)
    return list(dict.fromkeys([*real, *made]))[: arguments.texts]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m loadtests.answers",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--texts", type=int, default=100_000)
    parser.add_argument("--data", type=Path, help="table with a column `text`, sent first")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--reference", type=Path, default=Path("build/answers"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    checkpoint = read_store(STORE).latest(MODEL)
    texts = _texts(arguments, checkpoint)
    right = reference(checkpoint, texts, arguments.reference)
    labels = checkpoint.manifest.labels
    received, seconds = asyncio.run(ask(texts, len(labels)))
    rows, good = compare(received, right, labels)
    print("\n".join(["| | |", "|---|---|", *rows]))
    print(f"answered in {seconds:.0f} s")
    sys.exit(not good)


if __name__ == "__main__":
    main()
