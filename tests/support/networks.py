"""Small random networks, and hypothesis strategies for configurations, batches and budgets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from torch import Tensor

from budgetformer.inference.packed import PackedTokens
from budgetformer.model.configuration import BudgetFormerConfig
from budgetformer.model.modeling import BudgetFormerForSequenceClassification
from budgetformer.model.step0 import TfidfHead

VOCABULARY = 40
POSITIONS = 12

PROPERTY = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
"""Settings of property tests: the same examples in each run, without a time limit."""
LARGE = {"hidden_size": 256, "intermediate_size": 2048, "num_attention_heads": 4}
"""Sizes of a network that is large enough for a lower precision to be faster."""


def small_config(**changes: Any) -> BudgetFormerConfig:
    """Return a configuration of 3 layers and 4 heads, with the given arguments changed."""
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 24,
        "max_position_embeddings": POSITIONS,
        "controller_hidden_size": 5,
        "num_labels": 3,
    }
    return BudgetFormerConfig(**sizes | changes)


@torch.no_grad()
def random_network(
    config: BudgetFormerConfig, seed: int = 0
) -> BudgetFormerForSequenceClassification:
    """Return a network in evaluation mode; every parameter is random and large, biases included."""
    model = BudgetFormerForSequenceClassification(config).eval()
    random = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        parameter.normal_(0.0, 0.4, generator=random)
        if "norm.weight" in name:
            parameter += 1.0
    if isinstance(head := model.exit_head, TfidfHead):
        rows, columns = head.table.shape
        head.fill(
            torch.randn(columns, rows, generator=random),
            torch.randn(columns, generator=random),
            torch.randint(1, 200, (rows,), generator=random, dtype=torch.uint8),
            repeats=float(seed % 2),
        )
    return model


def new_network(seed: int = 0, **changes: Any) -> BudgetFormerForSequenceClassification:
    """Return an untrained network for the synthetic sentences of `tests.support.texts`."""
    sizes: dict[str, Any] = {
        "vocab_size": 150,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 32,
        "max_position_embeddings": 16,
        "controller_hidden_size": 4,
        "num_labels": 3,
        "initializer_range": 0.2,
    }
    torch.manual_seed(seed)
    return BudgetFormerForSequenceClassification(BudgetFormerConfig(**sizes | changes))


@dataclass(frozen=True)
class Item:
    """Token ids of one input and their segment ids, of the same length."""

    ids: list[int]
    segments: list[int]

    def __len__(self) -> int:
        return len(self.ids)


def pack(items: Sequence[Item]) -> PackedTokens:
    """Pack items for a compact pass."""
    return PackedTokens.pack([item.ids for item in items], [item.segments for item in items])


def pad(items: Sequence[Item]) -> dict[str, Tensor]:
    """Pad items for the reference network; the padding is not zero, so that masks matter."""
    longest = max([1, *map(len, items)])
    ids = torch.full((len(items), longest), 7)
    segments = torch.ones_like(ids)
    mask = torch.zeros_like(ids)
    for row, item in enumerate(items):
        ids[row, : len(item)] = torch.tensor(item.ids, dtype=torch.long)
        segments[row, : len(item)] = torch.tensor(item.segments, dtype=torch.long)
        mask[row, : len(item)] = 1
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": segments}


@torch.no_grad()
def reference_logits(
    network: BudgetFormerForSequenceClassification, items: Sequence[Item], **budget: Tensor | None
) -> Tensor:
    """Return the reference network's logits [B, C] for items, at its `steps` or `gates`."""
    logits: Tensor = network(**pad(items), **budget).logits
    return logits


def gates_of(heads: Sequence[Sequence[Sequence[int]]], num_heads: int) -> Tensor:
    """Turn head sets by item and layer into the reference network's gates [B, L, H]."""
    return torch.tensor(
        [[[float(head in kept) for head in range(num_heads)] for kept in item] for item in heads]
    )


def random_items(lengths: Sequence[int], seed: int = 0) -> list[Item]:
    """Return one item of random tokens per length; the second half of each is segment 1."""
    random = torch.Generator().manual_seed(seed)
    return [
        Item(
            torch.randint(1, VOCABULARY, (length,), generator=random).tolist(),
            [int(position * 2 >= length) for position in range(length)],
        )
        for length in lengths
    ]


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    """Compare float32 results relative to the largest expected magnitude."""
    assert actual.shape == expected.shape
    assert actual.isfinite().all()
    assert expected.isfinite().all()
    if expected.numel():
        scale = expected.abs().max().item()
        assert (actual - expected).abs().max().item() <= tolerance * scale


@st.composite
def ladders(draw: st.DrawFn, layers: int, heads: int, fewest: int = 0) -> list[list[int]]:
    """Draw a ladder of 1 to 5 plans, rising in the number of heads and rarely uniform."""
    plan = st.lists(st.integers(fewest, heads), min_size=layers, max_size=layers)
    return sorted(draw(st.lists(plan, min_size=1, max_size=5)), key=sum)


@st.composite
def configs(draw: st.DrawFn, **fixed: Any) -> BudgetFormerConfig:
    """Draw a configuration over every choice of the architecture; `fixed` arguments stay."""
    heads = draw(st.integers(1, 4))
    layers = draw(st.integers(1, 3))
    coupled = fixed.get("budget_ffn", draw(st.booleans()))
    scope = fixed.get("budget_scope", draw(st.sampled_from(["input", "layer"])))
    neurons = heads * draw(st.integers(1, 6)) if coupled else draw(st.integers(1, 20))
    several = draw(st.booleans())
    ladder = draw(st.none() | ladders(layers, heads, fewest=0 if coupled else 1))
    ladder = fixed.get("ladder", ladder)
    steps = heads if ladder is None else len(ladder)
    size = draw(st.sampled_from([2, 4, 6]))
    norm = fixed.get("norm_position", draw(st.sampled_from(["post", "pre"])))
    drawn: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": heads * size,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": neurons,
        "hidden_act": draw(st.sampled_from(["gelu", "relu"])),
        "max_position_embeddings": POSITIONS,
        "layer_norm_eps": 1e-5,
        "controller_hidden_size": draw(st.integers(1, 6)),
        "budget_ffn": coupled,
        "budget_scope": scope,
        "head_selection": draw(st.sampled_from(["input", "ranked"])),
        "norm_position": norm,
        "norm_first_layer": norm == "post" or draw(st.booleans()),
        "norm_embeddings": draw(st.sampled_from([None, True])),
        "embedding_size": draw(st.sampled_from([None, None, 3])),
        "gated_ffn": draw(st.booleans()),
        "head_norm": draw(st.booleans()),
        "pooling": draw(st.sampled_from(["mean", "cls"])),
        "head_activation": draw(st.sampled_from([None, "tanh"])),
        "ladder": ladder,
        "embedding_exit": scope == "input" and draw(st.booleans()),
        "exit_buckets": draw(st.sampled_from([0, 11])),
        "exit_rank": draw(st.sampled_from([0, 3])),
        "exit_tfidf": draw(st.booleans()),
        "exit_weight": draw(st.sampled_from([0.0, 0.7, [0.1 * step for step in range(steps)]])),
        "encoder_weight": draw(
            st.sampled_from([1.0] if scope == "layer" else [1.0, 0.4, [0.5] * steps])
        ),
        "num_labels": draw(st.integers(2, 5)),
        "problem_type": f"{'multi' if several else 'single'}_label_classification",
    }
    return BudgetFormerConfig(**drawn | draw(positions(layers)) | fixed)


@st.composite
def positions(draw: st.DrawFn, layers: int) -> dict[str, Any]:
    """Draw the position settings of a network."""
    by_layer = st.lists(st.sampled_from([0, 1, 2, 3]), min_size=layers, max_size=layers)
    scheme = draw(st.sampled_from(["absolute", "bias", "disentangled", "rotary", "local"]))
    drawn: dict[str, Any] = {"position_embeddings": scheme == "absolute" or draw(st.booleans())}
    if scheme in ("rotary", "local"):
        bases = st.lists(st.sampled_from([10.0, 1000.0]), min_size=layers, max_size=layers)
        drawn["rotary_bases"] = draw(bases)
    if scheme == "local":
        drawn["windows"] = draw(by_layer)
    if scheme == "bias":
        drawn |= {"relative_positions": scheme, "relative_buckets": 8, "relative_distance": 6}
    if scheme == "disentangled":
        terms = draw(st.sampled_from([["c2p"], ["p2c"], ["c2p", "p2c"]]))
        drawn |= {
            "relative_positions": scheme,
            "relative_terms": terms,
            "relative_shares_maps": draw(st.booleans()),
            "relative_norm": draw(st.booleans()),
            "relative_buckets": draw(st.sampled_from([0, 4])),
            "relative_distance": draw(st.sampled_from([5, 12])),
        }
    return drawn


@st.composite
def networks(draw: st.DrawFn, **fixed: Any) -> BudgetFormerForSequenceClassification:
    """Draw a random network; `fixed` configuration arguments stay."""
    return random_network(draw(configs(**fixed)), draw(st.integers(0, 2**16)))


@st.composite
def items(draw: st.DrawFn, shortest: int = 0) -> Item:
    """Draw a text, or a pair if there are two segments."""
    ids = draw(st.lists(st.integers(0, VOCABULARY - 1), min_size=shortest, max_size=POSITIONS))
    second = draw(st.integers(0, len(ids)))
    return Item(ids, [int(position >= second) for position in range(len(ids))])


def batches(smallest: int = 1, largest: int = 5) -> st.SearchStrategy[list[Item]]:
    """Draw the items of one batch."""
    return st.lists(items(), min_size=smallest, max_size=largest)


def step_lists(config: BudgetFormerConfig, count: int) -> st.SearchStrategy[list[int]]:
    """Draw a ladder step of at least 1 for each of `count` items."""
    return st.lists(st.integers(1, config.num_steps), min_size=count, max_size=count)
