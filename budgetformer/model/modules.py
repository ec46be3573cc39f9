"""The modules of a BudgetFormer network, to be read from top to bottom.

Plain torch: serving needs no more, and Transformers alone takes longer to import than a checkpoint
to load. `budgetformer.model.modeling` puts them together as a Transformers model.

Every head is computed here and heads outside the budget are masked, so this file is the truth that
the compact passes (`budgetformer.inference`) are tested against; it saves no time by itself.

Shapes: B items, T tokens, D width, H heads, L layers, C labels, I feed-forward neurons, k heads
kept.
Source: Faye et al., "Adaptive Head Budgeting for Efficient Multi-Head Attention", 2026 ("the
paper").
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from budgetformer.model.architecture import MULTI_LABEL as MULTI_LABEL
from budgetformer.model.architecture import Architecture
from budgetformer.model.tfidf import (
    HASHED_LEFT,
    HASHED_RIGHT,
    HASHED_SECOND,
    HASHED_SHARED,
    IDF_UNIT,
    MAX_ODDS,
    Array,
    StepZero,
    evidence,
)

_TANH_GELU = partial(F.gelu, approximate="tanh")
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_python": F.gelu,
    "gelu_new": _TANH_GELU,
    "gelu_fast": _TANH_GELU,
    "gelu_accurate": _TANH_GELU,
    "gelu_pytorch_tanh": _TANH_GELU,
    "gelu_python_tanh": _TANH_GELU,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "hardswish": F.hardswish,
    "leaky_relu": F.leaky_relu,
    "linear": lambda x: x,
    "mish": F.mish,
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "relu6": F.relu6,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "swish": F.silu,
    "tanh": torch.tanh,
}
"""By the names that Transformers gives them."""


def activation(name: str) -> Callable[[Tensor], Tensor]:
    """Return an activation by its name in Transformers.

    Raises:
        ValueError: it is unknown here.
    """
    try:
        return ACTIVATIONS[name]
    except KeyError:
        known = ", ".join(ACTIVATIONS)
        raise ValueError(f"unknown activation {name!r}; there are: {known}") from None


def probabilities(logits: Tensor, problem_type: str | None) -> Tensor:
    """Turn logits [..., C] into probabilities.

    A softmax, or one sigmoid per label when multi-label.
    """
    return logits.sigmoid() if problem_type == MULTI_LABEL else logits.softmax(-1)


def confidence(logits: Tensor, problem_type: str | None) -> Tensor:
    """Return how sure logits [..., C] are of their answer, [...] in (0, 1).

    The largest probability; for multi-label, the least decided label's distance from a coin flip.
    """
    p = probabilities(logits, problem_type)
    if problem_type == MULTI_LABEL:
        return torch.maximum(p, 1 - p).amin(-1)
    return p.amax(-1)


def exit_evidence(exit_logits: Tensor, problem_type: str | None) -> Tensor:
    """Summarise step-0 logits [B, C] for f_o.

    Log-odds of its confidence, and its mean entropy, [B, 2].
    """
    if problem_type == MULTI_LABEL:
        odds = exit_logits.abs().amin(-1)
    else:
        # From the logits: 1 - p would lose all its digits where step 0 is sure.
        top = exit_logits.argmax(-1, keepdim=True)
        others = exit_logits.scatter(-1, top, float("-inf")).logsumexp(-1)
        odds = exit_logits.gather(-1, top).squeeze(-1) - others
    p = probabilities(exit_logits, problem_type)
    entropy = torch.special.entr(p).sum(-1)
    if problem_type == MULTI_LABEL:
        entropy = (entropy + torch.special.entr(1 - p).sum(-1)) / p.shape[-1]
    return torch.stack([odds.clamp(max=MAX_ODDS), entropy], dim=-1)


def fuse(
    logits: Tensor,
    exit_logits: Tensor | None,
    encoder_weight: Tensor | float,
    exit_weight: Tensor | float,
) -> Tensor:
    """Combine the encoder's logits [B, C] with step 0's into the answer of a step >= 1.

    Args:
        logits: the encoder's, [B, C].
        exit_logits: step 0's, [B, C]; None: the network has no step 0.
        encoder_weight: see `Architecture`; one number, or one for each item [B, 1].
        exit_weight: the same.
    """
    weighted = encoder_weight * logits
    return weighted if exit_logits is None else weighted + exit_weight * exit_logits


def masked_mean(states: Tensor, attention_mask: Tensor) -> Tensor:
    """Average token states [B, T, D] over the real tokens of [B, T].

    No token at all gives zeros.
    """
    weights = attention_mask.to(states.dtype).unsqueeze(-1)
    return (states * weights).sum(1) / weights.sum(1).clamp(min=1)


def keep_top(scores: Tensor, heads: Tensor) -> Tensor:
    """Mark the `heads` [...] highest of scores [..., H] with 1, the others with 0.

    Ties go to the lower index.
    """
    order = scores.argsort(dim=-1, descending=True, stable=True)
    return (order.argsort(dim=-1) < heads.unsqueeze(-1)).to(scores.dtype)


class Embeddings(nn.Module):
    """Sum word, position and segment embeddings, then (post-norm encoders) normalise."""

    def __init__(self, config: Architecture) -> None:
        super().__init__()
        width = config.hidden_size
        self.word = nn.Embedding(config.vocab_size, width, padding_idx=config.pad_token_id)
        self.position = nn.Embedding(config.max_position_embeddings, width)
        self.segment = nn.Embedding(config.type_vocab_size, width)
        post = config.norm_position == "post"
        self.norm = nn.LayerNorm(width, eps=config.layer_norm_eps) if post else nn.Identity()
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.states_dtype: torch.dtype | None = None
        """What rows of the tables are turned into; None: they are added as they lie."""

    def forward(self, input_ids: Tensor, token_type_ids: Tensor, position_ids: Tensor) -> Tensor:
        """Embed ids of one shape [...] into states [..., D]."""
        rows = [self.word(input_ids), self.segment(token_type_ids), self.position(position_ids)]
        if self.states_dtype is not None:
            rows = [row.to(self.states_dtype) for row in rows]
        states = rows[0] + rows[1] + rows[2]
        return cast(Tensor, self.dropout(self.norm(states)))


class BudgetController(nn.Module):
    """f_o: from a pooled state, the share of the heads that an input needs (paper)."""

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(input_size, hidden_size)
        self.out = nn.Linear(hidden_size, 1)

    def forward(self, pooled: Tensor) -> Tensor:
        """Map pooled states [B, D'] to s [B] in (0, 1)."""
        logit = cast(Tensor, self.out(F.relu(self.hidden(pooled))))
        return logit.squeeze(-1).sigmoid()

    def fix(self, share: float) -> None:
        """Answer `share` to every input, and learn no more: the ablation without f_o (paper).

        The weights say so, so every pass and every saved copy of this network does the same.
        """
        self.requires_grad_(False)
        self.out.weight.zero_()
        self.out.bias.fill_(torch.logit(torch.tensor(share), eps=1e-6).item())


class HeadScorer(nn.Module):
    """g_d: from a pooled state, how relevant each head is (paper, head scorer).

    With `budget_scope = "input"` one scorer speaks for all layers at once.
    """

    def __init__(self, config: Architecture, num_layers: int) -> None:
        super().__init__()
        self.num_layers, self.num_heads = num_layers, config.num_attention_heads
        self.out = nn.Linear(config.hidden_size, num_layers * self.num_heads)

    def forward(self, pooled: Tensor) -> Tensor:
        """Map pooled states [B, D] to scores [B, layers, H]; their softmax is the relevance."""
        return cast(Tensor, self.out(pooled)).view(-1, self.num_layers, self.num_heads)


@dataclass(frozen=True)
class Gating:
    """How budgets become gates while training; evaluation always uses hard gates.

    `mode` "hard" keeps the top k with a straight-through gradient on the relevance; "soft" is the
    paper's training form, all heads kept and weighted. `temperature` divides the scores before the
    softmax and `noise` is the standard deviation added to them: high early (exploration), annealed
    late (exploitation). `random_heads` puts noise alone in place of g_d's scores, in evaluation
    too: the paper's ablation without g_d.
    """

    mode: Literal["hard", "soft"] = "hard"
    temperature: float = 1.0
    noise: float = 0.0
    random_heads: bool = False


@dataclass(frozen=True)
class Decision:
    """What f_o and g_d said.

    budget s [B], relevance [B, layers, H] or None (ranked), gates [B, layers, H].
    """

    budget: Tensor
    relevance: Tensor | None
    gates: Tensor


class BudgetDecision(nn.Module):
    """Turn a pooled state into head gates.

    For all layers (scope "input") or for one (scope "layer").
    """

    def __init__(self, config: Architecture, layer: int | None = None) -> None:
        super().__init__()
        self.config = config
        self.layers = list(range(config.num_hidden_layers)) if layer is None else [layer]
        self.controller = BudgetController(config.decision_inputs, config.controller_hidden_size)
        picks = config.head_selection == "input"
        self.scorer = HeadScorer(config, len(self.layers)) if picks else None
        self.gating = Gating()

    def budget(self, pooled: Tensor, evidence: Tensor | None = None) -> Tensor:
        """Return s [B] for pooled states [B, D] and, with a step 0, its evidence [B, E]."""
        parts = [] if self.config.decides_from_step0 else [pooled]
        missing = self.config.decision_inputs - sum(part.shape[-1] for part in parts)
        if missing:
            none = pooled.new_zeros(len(pooled), missing)
            parts.append(none if evidence is None else evidence.to(pooled.dtype))
        return cast(Tensor, self.controller(torch.cat(parts, dim=-1)))

    def heads(self, steps: Tensor) -> Tensor:
        """Look up ladder steps [B] (0 allowed): heads kept in each of these layers, [B, layers]."""
        plans = [[0] * self.config.num_hidden_layers, *self.config.ladder]
        table = torch.tensor(plans, device=steps.device)[:, self.layers]
        return table[steps]

    def forward(
        self, pooled: Tensor, steps: Tensor | None = None, evidence: Tensor | None = None
    ) -> Decision:
        """Decide for pooled states [B, D]; `steps` [B] overrides f_o."""
        s = share = self.budget(pooled, evidence)
        if steps is None:
            steps = budget_step(s, self.config.num_steps)
        else:
            share = s.detach()  # f_o had no say: no gradient flows through it
        heads = self.heads(steps)
        scores = self._scores(pooled)
        if scores is None:
            first = torch.arange(self.config.num_attention_heads, device=pooled.device)
            hard = (first < heads.unsqueeze(-1)).to(pooled.dtype)
            return Decision(s, None, self._soften(hard, share, None))
        relevance = (scores / self.gating.temperature).softmax(-1)
        return Decision(s, relevance, self._soften(keep_top(scores, heads), share, relevance))

    def _scores(self, pooled: Tensor) -> Tensor | None:
        if self.scorer is None:
            return None
        scores = cast(Tensor, self.scorer(pooled))
        if self.gating.random_heads:
            return torch.randn_like(scores)
        if self.training and self.gating.noise:
            scores = scores + self.gating.noise * torch.randn_like(scores)
        return scores

    def _soften(self, hard: Tensor, s: Tensor, relevance: Tensor | None) -> Tensor:
        if not self.training:
            return hard
        share = s[:, None, None] * self.config.num_attention_heads
        if relevance is None:
            place = torch.arange(self.config.num_attention_heads, device=s.device) + 0.5
            soft = ((share - place) / self.gating.temperature).sigmoid().expand_as(hard)
        else:
            soft = share * relevance
        if self.gating.mode == "soft":
            return soft
        return hard + soft - soft.detach()


def budget_step(s: Tensor, num_steps: int) -> Tensor:
    """Apply the paper's rule k = ceil(s * H), on a ladder of S steps.

    Maps s [B] to steps [B] in 1..S.
    """
    return (s * num_steps).ceil().long().clamp(1, num_steps)


class AdaptiveMultiHeadAttention(nn.Module):
    """Multi-head self-attention whose heads are switched by gates."""

    def __init__(self, config: Architecture) -> None:
        super().__init__()
        width = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.query, self.key, self.value, self.output = (nn.Linear(width, width) for _ in range(4))
        self.dropout = config.attention_probs_dropout_prob

    def forward(self, states: Tensor, bias: Tensor, gates: Tensor) -> Tensor:
        """Attend over states [B, T, D] with additive mask [B, 1, 1, T] and gates [B, H]."""
        query, key, value = (
            project(states).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for project in (self.query, self.key, self.value)
        )
        dropout = self.dropout if self.training else 0.0
        context = F.scaled_dot_product_attention(
            query, key, value, attn_mask=bias.to(query.dtype), dropout_p=dropout
        )
        context = context * gates[:, :, None, None]
        return cast(Tensor, self.output(context.transpose(1, 2).flatten(2)))


class FeedForward(nn.Module):
    """The position-wise net; coupled, head h owns neurons h*I/H .. (h+1)*I/H and gates them."""

    def __init__(self, config: Architecture) -> None:
        super().__init__()
        self.neurons_per_head = config.neurons_per_head if config.budget_ffn else None
        self.up = nn.Linear(config.hidden_size, config.intermediate_size)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size)
        self.activation = activation(config.hidden_act)

    def forward(self, states: Tensor, gates: Tensor) -> Tensor:
        """Transform states [B, T, D] under gates [B, H]."""
        neurons = self.activation(self.up(states))
        if self.neurons_per_head is not None:
            neurons = neurons * gates.repeat_interleave(self.neurons_per_head, dim=-1)[:, None, :]
        return cast(Tensor, self.down(neurons))


class EncoderLayer(nn.Module):
    """Attention and feed-forward net with residuals.

    An item whose heads are all off passes unchanged.
    """

    def __init__(self, config: Architecture, index: int) -> None:
        super().__init__()
        self.attention = AdaptiveMultiHeadAttention(config)
        self.attention_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.feed_forward = FeedForward(config)
        self.feed_forward_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.post = config.norm_position == "post"
        self.decision = BudgetDecision(config, index) if config.budget_scope == "layer" else None

    def forward(self, states: Tensor, bias: Tensor, gates: Tensor) -> Tensor:
        """Transform states [B, T, D] under additive mask [B, 1, 1, T] and gates [B, H]."""
        if self.post:
            mixed = self.attention_norm(states + self.dropout(self.attention(states, bias, gates)))
            result = self.feed_forward_norm(mixed + self.dropout(self.feed_forward(mixed, gates)))
        else:
            mixed = states + self.dropout(self.attention(self.attention_norm(states), bias, gates))
            result = mixed + self.dropout(self.feed_forward(self.feed_forward_norm(mixed), gates))
        used = (gates != 0).any(-1)[:, None, None]
        return torch.where(used, result, states)


class ExitHead(nn.Module):
    """Step 0: a linear classifier on the bag of tokens and of neighbours, before the encoder runs.

    Neighbouring tokens share a table of `exit_buckets` rows by their hash (as fastText does): word
    order is where a bag of single tokens is weakest, and a look-up multiplies nothing. With many
    labels the table holds short vectors, and one linear map makes logits of their sum.
    """

    def __init__(self, config: Architecture) -> None:
        super().__init__()
        self.vocab_size, self.buckets = config.vocab_size, config.exit_buckets
        self.weight = nn.Embedding(
            config.vocab_size + config.exit_buckets,
            config.exit_rank or config.num_classes,
            padding_idx=config.pad_token_id,
        )
        self.map = (
            nn.Linear(config.exit_rank, config.num_classes, bias=False)
            if config.exit_rank
            else nn.Identity()
        )
        self.bias = nn.Parameter(torch.zeros(config.num_classes))

    def neighbours(self, input_ids: Tensor) -> Tensor:
        """Return the table rows of each token and its right neighbour: ids [..., T] to [..., T-1].

        Raises:
            ValueError: this head reads single tokens only.
        """
        if not self.buckets:
            raise ValueError("this step 0 has no rows for neighbours")
        left, right = input_ids[..., :-1], input_ids[..., 1:]
        return self.vocab_size + (left * HASHED_LEFT + right * HASHED_RIGHT) % self.buckets

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Classify ids [B, T] into logits [B, C]."""
        mask = attention_mask.to(self.bias.dtype)
        rows = input_ids
        if self.buckets:
            rows = torch.cat([input_ids, self.neighbours(input_ids)], dim=1)
            mask = torch.cat([mask, mask[:, :-1] * mask[:, 1:]], dim=1)
        total = (cast(Tensor, self.weight(rows)) * mask.unsqueeze(-1)).sum(1)
        return self.logits(total / mask.sum(1, keepdim=True).clamp(min=1).sqrt())

    def logits(self, bag: Tensor) -> Tensor:
        """Turn bags [B, R] into logits [B, C].

        A bag is the sum of the rows of n tokens and neighbours, divided by the root of n.
        """
        return cast(Tensor, self.map(bag)) + self.bias


def table_columns(classes: int, multi_label: bool) -> int:
    """Return the columns of step 0's table: two labels that exclude each other need one."""
    return 1 if classes == 2 and not multi_label else classes


class TfidfHead(nn.Module):
    """Step 0: a linear classifier on TF-IDF features of tokens and of neighbouring tokens.

    A look-up multiplies nothing, and a text's features are few, so this costs microseconds. Two
    labels need one column of the table, C labels C. `budgetformer.model.tfidf` computes the same
    with NumPy, and says what the features are.
    """

    table: Tensor
    scale: Tensor
    idf: Tensor
    repeats: Tensor
    bias: Tensor

    def __init__(self, config: Architecture) -> None:
        super().__init__()
        self.vocab_size, self.buckets = config.vocab_size, config.exit_buckets
        rows = config.vocab_size + config.exit_buckets
        self.classes = config.num_classes
        columns = table_columns(self.classes, config.problem_type == MULTI_LABEL)
        self.register_buffer("table", torch.zeros(rows, columns, dtype=torch.int8))
        self.register_buffer("idf", torch.ones(rows, dtype=torch.uint8))
        self.register_buffer("scale", torch.zeros(columns))
        self.register_buffer("bias", torch.zeros(columns))
        self.register_buffer("repeats", torch.zeros(()))

    def fill(self, coefficients: Tensor, intercept: Tensor, idf: Tensor, repeats: float) -> None:
        """Take fitted weights.

        Args:
            coefficients: of each column, [K, rows]; kept as whole numbers of eight bits.
            intercept: of each column, [K].
            idf: of each row, in units of `step0.IDF_UNIT`, [rows].
            repeats: see `step0.tfidf`.
        """
        self.scale = coefficients.abs().amax(-1).float() / 127
        whole = coefficients.float() / self.scale.clamp(min=1e-12)[:, None]
        self.table = whole.round().to(torch.int8).T.contiguous()
        self.idf, self.bias = idf, intercept.float()
        self.repeats = torch.tensor(float(repeats))

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
    ) -> Tensor:
        """Classify ids [B, T] into logits [B, C]."""
        kept = attention_mask.bool()
        texts = [ids[mask] for ids, mask in zip(input_ids, kept, strict=True)]
        segments = (
            None
            if token_type_ids is None
            else [own[mask] for own, mask in zip(token_type_ids, kept, strict=True)]
        )
        return torch.stack(
            [
                self._one(text, None if segments is None else segments[place])
                for place, text in enumerate(texts)
            ]
        )

    def _one(self, ids: Tensor, segments: Tensor | None) -> Tensor:
        """Classify one text's ids [T] into logits [C]."""
        rows = ids
        if self.buckets:
            if segments is not None:
                second = segments > 0
                shared = torch.isin(ids, ids[~second])
                hashed = (ids * HASHED_SECOND + shared.long() * HASHED_SHARED) % self.buckets
                rows = torch.where(second, self.vocab_size + hashed, ids)
            pairs = (ids[:-1] * HASHED_LEFT + ids[1:] * HASHED_RIGHT) % self.buckets
            rows = torch.cat([rows, self.vocab_size + pairs])
        rows, counts = rows.unique(return_counts=True)
        weight = self.idf[rows].float() * IDF_UNIT * (1 + self.repeats * counts.log())
        weight = weight / weight.norm().clamp(min=1e-9)
        scores = (self.table[rows].float() * weight[:, None]).sum(0) * self.scale + self.bias
        return scores if len(scores) == self.classes else torch.cat([-scores, scores])


class Encoder(nn.Module):
    """Embeddings and encoder layers; whoever inherits or makes one calls `build`."""

    config: Architecture
    embeddings: Embeddings
    decision: BudgetDecision | None
    layers: nn.ModuleList
    final_norm: nn.Module

    def build(self, config: Architecture) -> None:
        """Make embeddings, layers, and the budget's decision where it is made once per input."""
        self.config = config
        self.embeddings = Embeddings(config)
        self.decision = BudgetDecision(config) if config.budget_scope == "input" else None
        self.layers = nn.ModuleList(
            EncoderLayer(config, i) for i in range(config.num_hidden_layers)
        )
        pre = config.norm_position == "pre"
        self.final_norm = (
            nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps) if pre else nn.Identity()
        )

    def embed(self, input_ids: Tensor, token_type_ids: Tensor | None) -> Tensor:
        """Embed ids [B, T] into states [B, T, D].

        Raises:
            ValueError: T is more than the network has positions for.
        """
        length = input_ids.shape[1]
        if length > self.config.max_position_embeddings:
            raise ValueError(
                f"{length} tokens, but only {self.config.max_position_embeddings} positions"
            )
        if token_type_ids is None:
            token_type_ids = torch.zeros_like(input_ids)
        positions = torch.arange(length, device=input_ids.device).expand_as(input_ids)
        return cast(Tensor, self.embeddings(input_ids, token_type_ids, positions))

    @property
    def encoder_layers(self) -> list[EncoderLayer]:
        """The layers, first to last."""
        return [cast(EncoderLayer, layer) for layer in self.layers]


class SequenceClassifier(nn.Module):
    """A network to classify with, as the compact pass runs it.

    `load_weights` makes one by itself; a Transformers model inherits and calls `build`.
    """

    config: Architecture
    encoder: Encoder
    head: nn.Linear | None
    classifier: nn.Linear
    exit_head: ExitHead | TfidfHead | None

    def build(self, encoder: Encoder, config: Architecture) -> None:
        """Put the classification head, and step 0 where there is one, beside an encoder."""
        self.config = config
        self.encoder = encoder
        rate = config.classifier_dropout
        self.dropout = nn.Dropout(config.hidden_dropout_prob if rate is None else rate)
        width = config.hidden_size
        self.head = None if config.head_activation is None else nn.Linear(width, width)
        self._activation = activation(config.head_activation or "tanh")
        self.classifier = nn.Linear(width, config.num_classes)
        self.exit_head = None
        if config.embedding_exit:
            self.exit_head = TfidfHead(config) if config.exit_tfidf else ExitHead(config)

    @property
    def where(self) -> torch.device:
        """Where the weights are."""
        return self.classifier.weight.device

    def step0(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return step 0's logits [B, C] for ids [B, T], and what f_o reads of them [B, E].

        Raises:
            ValueError: the network has no step 0.
        """
        problem_type = self.config.problem_type
        if isinstance(self.exit_head, TfidfHead):
            logits = self.exit_head(input_ids, attention_mask, token_type_ids)
            lengths = attention_mask.sum(1).numpy(force=True)
            found = evidence(logits.numpy(force=True), lengths, problem_type)
            return logits, torch.from_numpy(found).to(logits.device)
        if self.exit_head is None:
            raise ValueError("the network has no step 0")
        logits = self.exit_head(input_ids, attention_mask)
        return logits, exit_evidence(logits.detach(), problem_type)

    def step0_with_numpy(self) -> StepZero | None:
        """Return step 0 and f_o as NumPy runs them; None: f_o reads more than step 0's answer."""
        head, decision = self.exit_head, self.encoder.decision
        if not isinstance(head, TfidfHead) or decision is None:
            return None

        def array(tensor: Tensor) -> Array:
            return tensor.detach().cpu().numpy()

        layers = decision.controller.hidden, decision.controller.out
        return StepZero(
            table=array(head.table),
            scale=array(head.scale),
            bias=array(head.bias),
            idf=array(head.idf),
            repeats=float(head.repeats),
            vocab_size=head.vocab_size,
            buckets=head.buckets,
            classes=head.classes,
            problem_type=self.config.problem_type,
            hidden=(array(layers[0].weight), array(layers[0].bias)),
            out=(array(layers[1].weight), array(layers[1].bias)),
        )

    def classify(self, pooled: Tensor) -> Tensor:
        """Map pooled states [B, D] to the encoder's logits [B, C], step 0's share not added."""
        if self.head is not None:
            pooled = self._activation(self.head(pooled))
        return cast(Tensor, self.classifier(pooled))
