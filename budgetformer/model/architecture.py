"""The sizes and options of a BudgetFormer network, and its budget ladder, as plain numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from inspect import signature
from typing import Any, Literal, get_args

MULTI_LABEL = "multi_label_classification"
"""`problem_type` of networks that may assign several labels to one text."""

BudgetScope = Literal["input", "layer"]
HeadSelection = Literal["input", "ranked"]
Pooling = Literal["mean", "cls"]
NormPosition = Literal["post", "pre"]
RelativePositions = Literal["bias", "disentangled"]

EVIDENCE_FEATURES = 4
"""Features of a TF-IDF step 0's answer that f_o reads (`budgetformer.model.tfidf.evidence`)."""
EVIDENCE_SIZE = 2
"""Features that f_o reads in older checkpoints, in addition to the pooled embeddings."""


def uniform_ladder(num_layers: int, num_heads: int) -> list[list[int]]:
    """Return the paper's ladder: step k keeps k heads in every layer, for k = 1..H."""
    return [[step] * num_layers for step in range(1, num_heads + 1)]


class Architecture:
    """Describe a BudgetFormer encoder and its classification head.

    Sizes (`vocab_size`, `hidden_size`, `num_hidden_layers`, `num_attention_heads`,
    `intermediate_size`, `max_position_embeddings`, `type_vocab_size`, `layer_norm_eps`,
    `hidden_act`, dropouts) have the same meaning as for BERT. Arguments specific to this network:

    Args:
        norm_position: `"post"` (BERT: layer norm after each residual sum) or `"pre"`.
        norm_first_layer: apply a norm to the input of the first layer's attention. Some pre-norm
            encoders have none there because their embeddings are already normalised.
        norm_embeddings: normalise the embeddings; None means only with `"post"`.
        embedding_size: width of the embeddings, which a linear map projects to `hidden_size`;
            None means they have width `hidden_size`.
        position_embeddings: add a learned vector per absolute position to the embeddings.
        relative_positions: `"bias"` adds a learned number per distance to each head's scores (T5,
            MPNet), `"disentangled"` adds content-to-position scores (DeBERTa); None: neither.
        relative_buckets: rows of the bias table. For disentangled positions, half of the distinct
            distances; 0 means `relative_distance`.
        relative_distance: distance from which all larger distances share a row.
        relative_terms: terms of disentangled positions: `"c2p"` (content to position) and `"p2c"`
            (position to content).
        relative_shares_maps: compute disentangled positions with the query and key maps.
        relative_norm: normalise the distance embeddings.
        rotary_bases: base of each layer's rotary positions; None: no rotary positions.
        windows: tokens on each side that a token attends to, per layer, 0 for all; None: all.
        gated_ffn: use a gated feed-forward net (GLU), `activation(gate(x)) * up(x)`.
        pooling: how token states become one vector for the classifier, `"mean"` or `"cls"`.
        head_activation: insert a dense layer with this activation between the pooled state and the
            classifier, as BERT ("tanh") and DistilBERT ("relu") do; None: no such layer.
        head_norm: normalise after that activation, as ModernBERT does.
        budget_ffn: couple the feed-forward net to the heads: each head owns 1/H of the neurons,
            which are computed only if the head is. False: compute all neurons (paper).
        budget_scope: `"input"` decides budget and heads once per input, from the pooled embeddings;
            `"layer"` decides in each layer from its own pooled input (paper).
        head_selection: `"input"` lets the head scorer g_d choose heads per input (paper);
            `"ranked"` orders the heads of each layer once, and a budget of k computes the first k.
        ladder: heads per layer for each budget step 1..S, in order of rising cost. None: the
            uniform ladder, step k = k heads in every layer. With `budget_ffn`, a layer may have 0
            heads and is then skipped.
        embedding_exit: add step 0, a linear head on the bag of tokens that answers before the
            encoder runs.
        exit_buckets: hash rows in step 0's table for pairs of neighbouring tokens; 0: step 0 reads
            single tokens only.
        exit_tfidf: make step 0 a linear classifier on TF-IDF features, whose answer is f_o's only
            input. False (older checkpoints): step 0 is a bag of trained token vectors, and f_o
            also reads the pooled embeddings.
        exit_rank: width of step 0's token vectors, which a linear map turns into logits; 0: each
            token has a weight per label.
        encoder_weight, exit_weight: weights of the encoder's and of step 0's logits in the answer
            of a step >= 1: one number for all steps, or one for each of 1..S. Calibration fits both
            (`budgetformer.training.fusion`).
        controller_hidden_size: width of f_o's hidden layer.
        budget_bounds: (s_min, s_max); the budget regulariser penalises s outside of them (paper:
            0.1, 0.9).

    Raises:
        ValueError: a size is not divisible as required, an option is unknown, or the ladder does
            not match the sizes.
    """

    id2label: dict[int, str]
    problem_type: str | None

    def __init__(
        self,
        vocab_size: int = 30522,
        hidden_size: int = 256,
        num_hidden_layers: int = 4,
        num_attention_heads: int = 8,
        intermediate_size: int = 1024,
        hidden_act: str = "gelu",
        max_position_embeddings: int = 512,
        type_vocab_size: int = 2,
        layer_norm_eps: float = 1e-12,
        initializer_range: float = 0.02,
        hidden_dropout_prob: float = 0.1,
        attention_probs_dropout_prob: float = 0.1,
        classifier_dropout: float | None = None,
        norm_position: NormPosition = "post",
        norm_first_layer: bool = True,
        norm_embeddings: bool | None = None,
        embedding_size: int | None = None,
        position_embeddings: bool = True,
        relative_positions: RelativePositions | None = None,
        relative_buckets: int = 0,
        relative_distance: int = 0,
        relative_terms: Sequence[str] = (),
        relative_shares_maps: bool = True,
        relative_norm: bool = False,
        rotary_bases: list[float] | None = None,
        windows: list[int] | None = None,
        gated_ffn: bool = False,
        pooling: Pooling = "mean",
        head_activation: str | None = None,
        head_norm: bool = False,
        budget_ffn: bool = True,
        budget_scope: BudgetScope = "input",
        head_selection: HeadSelection = "ranked",
        ladder: list[list[int]] | None = None,
        embedding_exit: bool = False,
        exit_tfidf: bool = False,
        exit_buckets: int = 0,
        exit_rank: int = 0,
        exit_weight: float | list[float] = 0.0,
        encoder_weight: float | list[float] = 1.0,
        controller_hidden_size: int = 64,
        budget_bounds: tuple[float, float] = (0.1, 0.9),
        pad_token_id: int | None = 0,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.intermediate_size = intermediate_size
        self.hidden_act = hidden_act
        self.max_position_embeddings = max_position_embeddings
        self.type_vocab_size = type_vocab_size
        self.layer_norm_eps = layer_norm_eps
        self.initializer_range = initializer_range
        self.hidden_dropout_prob = hidden_dropout_prob
        self.attention_probs_dropout_prob = attention_probs_dropout_prob
        self.classifier_dropout = classifier_dropout
        self.norm_position = norm_position
        self.norm_first_layer = norm_first_layer
        post = norm_position == "post"
        self.norm_embeddings = post if norm_embeddings is None else norm_embeddings
        self.embedding_size = embedding_size
        self.position_embeddings = position_embeddings
        self.relative_positions = relative_positions
        self.relative_buckets = relative_buckets
        self.relative_distance = relative_distance
        self.relative_terms = list(relative_terms)
        self.relative_shares_maps = relative_shares_maps
        self.relative_norm = relative_norm
        self.rotary_bases = rotary_bases
        self.windows = windows
        self.gated_ffn = gated_ffn
        self.pooling = pooling
        self.head_activation = head_activation
        self.head_norm = head_norm
        self.budget_ffn = budget_ffn
        self.budget_scope = budget_scope
        self.head_selection = head_selection
        self.ladder = (
            ladder if ladder is not None else uniform_ladder(num_hidden_layers, num_attention_heads)
        )
        self.embedding_exit = embedding_exit
        self.exit_tfidf = exit_tfidf
        self.exit_buckets = exit_buckets
        self.exit_rank = exit_rank
        self.exit_weight = exit_weight
        self.encoder_weight = encoder_weight
        self.controller_hidden_size = controller_hidden_size
        self.budget_bounds = list(budget_bounds)
        self.pad_token_id = pad_token_id
        self._check()

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> Architecture:
        """Return the architecture that a parsed `config.json` describes; other keys are ignored.

        Raises:
            KeyError, TypeError, ValueError: `id2label` is missing or a value is invalid.
        """
        architecture = cls(**{name: config[name] for name in FIELDS if name in config})
        architecture.id2label = config["id2label"]
        architecture.problem_type = config.get("problem_type")
        return architecture

    @property
    def head_size(self) -> int:
        """Width of one attention head, D / H."""
        return self.hidden_size // self.num_attention_heads

    def window(self, layer: int) -> int | None:
        """Return the number of tokens on each side that a layer's tokens attend to; None: all."""
        return (self.windows[layer] or None) if self.windows else None

    def rotary_base(self, layer: int) -> float | None:
        """Return the base of a layer's rotary positions; None if it has none."""
        return self.rotary_bases[layer] if self.rotary_bases else None

    @property
    def relative_span(self) -> int:
        """Half of the rows of the distance embeddings."""
        return self.relative_buckets or self.relative_distance

    @property
    def num_classes(self) -> int:
        """Number of labels C."""
        return len(self.id2label or ())

    @property
    def neurons_per_head(self) -> int:
        """Feed-forward neurons that one head owns with `budget_ffn`."""
        return self.intermediate_size // self.num_attention_heads

    @property
    def num_steps(self) -> int:
        """Number of ladder steps S, step 0 not counted."""
        return len(self.ladder)

    @property
    def has_one_budget(self) -> bool:
        """Whether every text runs the same step, so that there is no budget to decide."""
        return (
            self.num_steps == 1
            and not self.embedding_exit
            and self.budget_scope == "input"
            and self.head_selection == "ranked"
        )

    @property
    def decides_from_step0(self) -> bool:
        """Whether step 0's answer is f_o's only input, without the pooled embeddings."""
        return self.embedding_exit and self.exit_tfidf

    @property
    def decision_inputs(self) -> int:
        """Width of f_o's input."""
        if self.decides_from_step0:
            return EVIDENCE_FEATURES
        return self.hidden_size + (EVIDENCE_SIZE if self.embedding_exit else 0)

    @property
    def exit_weights(self) -> list[float]:
        """Weight of step 0's logits in the answer of each step 1..S."""
        return self._each_step(self.exit_weight)

    @property
    def encoder_weights(self) -> list[float]:
        """Weight of the encoder's logits in the answer of each step 1..S."""
        return self._each_step(self.encoder_weight)

    def _each_step(self, weight: float | list[float]) -> list[float]:
        return weight if isinstance(weight, list) else [weight] * self.num_steps

    def heads_per_layer(self, step: int) -> list[int]:
        """Return the number of heads of each layer at ladder step `step`; step 0 computes none.

        Raises:
            ValueError: the ladder has no such step.
        """
        if step == 0 and self.embedding_exit:
            return [0] * self.num_hidden_layers
        if not 1 <= step <= self.num_steps:
            first = 0 if self.embedding_exit else 1
            raise ValueError(f"budget step {step} is not on the ladder ({first}..{self.num_steps})")
        return self.ladder[step - 1]

    def covering_step(self, heads_per_layer: Sequence[int]) -> int:
        """Return the first step with at least these numbers of heads; if none has, the last."""
        for step, plan in enumerate(self.ladder, start=1):
            if all(kept <= planned for kept, planned in zip(heads_per_layer, plan, strict=True)):
                return step
        return self.num_steps

    def _check(self) -> None:
        num_heads = self.num_attention_heads
        for name, allowed in (
            ("norm_position", get_args(NormPosition)),
            ("pooling", get_args(Pooling)),
            ("budget_scope", get_args(BudgetScope)),
            ("head_selection", get_args(HeadSelection)),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, not {getattr(self, name)!r}")
        self._check_positions()
        if num_heads < 1:
            raise ValueError(f"num_attention_heads must be at least 1, not {num_heads}")
        for name in ("exit_buckets", "exit_rank"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, it is {getattr(self, name)}")
        if self.hidden_size % num_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of {num_heads} heads"
            )
        if self.budget_ffn and self.intermediate_size % num_heads:
            raise ValueError(
                f"intermediate_size {self.intermediate_size} is not a multiple of {num_heads} "
                "heads, as budget_ffn requires"
            )
        if not self.ladder:
            raise ValueError("the ladder has no step")
        fewest = 0 if self.budget_ffn else 1
        for step, plan in enumerate(self.ladder, start=1):
            if len(plan) != self.num_hidden_layers:
                layers = self.num_hidden_layers
                raise ValueError(f"ladder step {step} has {len(plan)} entries for {layers} layers")
            if not all(isinstance(k, int) and fewest <= k <= num_heads for k in plan):
                raise ValueError(
                    f"ladder step {step} must have {fewest} to {num_heads} heads per layer, "
                    f"not {plan}"
                )
            if step > 1 and sum(plan) < sum(self.ladder[step - 2]):
                raise ValueError(f"ladder step {step} computes fewer heads than the step before it")
        for name in ("exit_weight", "encoder_weight"):
            weight = getattr(self, name)
            weights = self._each_step(weight)
            if len(weights) != self.num_steps or not all(map(math.isfinite, weights)):
                raise ValueError(
                    f"{name} must be a finite number or a list of {self.num_steps} (one per step), "
                    f"not {weight}"
                )
        if self.budget_scope == "layer" and self.encoder_weight != 1:
            raise ValueError(
                'encoder_weight requires budget_scope "input": with "layer" an answer has no step'
            )
        if self.budget_scope == "layer" and self.embedding_exit:
            raise ValueError(
                'embedding_exit requires budget_scope "input": step 0 is decided before the encoder'
            )

    def _check_positions(self) -> None:
        known = (None, *get_args(RelativePositions))
        if self.relative_positions not in known:
            raise ValueError(
                f"relative_positions must be one of {known}, not {self.relative_positions!r}"
            )
        if self.relative_positions is not None and self.relative_span < 1:
            raise ValueError("relative_positions requires relative_buckets or relative_distance")
        if unknown := set(self.relative_terms) - {"c2p", "p2c"}:
            raise ValueError(f"relative_terms may be 'c2p' and 'p2c', not {sorted(unknown)}")
        layers = self.num_hidden_layers
        for name in ("rotary_bases", "windows"):
            by_layer = getattr(self, name)
            if by_layer is not None and len(by_layer) != layers:
                raise ValueError(
                    f"{name} must have {layers} numbers, one per layer, not {len(by_layer)}"
                )
        if self.relative_positions is not None and any(self.windows or ()):
            raise ValueError("local attention (windows) does not support relative_positions")
        if self.rotary_bases is not None and self.head_size % 2:
            raise ValueError(f"rotary_bases requires an even head size, not {self.head_size}")


FIELDS = tuple(signature(Architecture).parameters)
"""Names of the constructor's arguments, which `config.json` holds."""
