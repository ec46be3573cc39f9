"""The encoder and the classification network around it.

Shapes: B items, T tokens, D width, C labels, E features of step 0's answer.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from budgetformer.model.activations import activation
from budgetformer.model.architecture import Architecture
from budgetformer.model.budget import BudgetDecision
from budgetformer.model.embeddings import Embeddings, masked_mean
from budgetformer.model.layer import EncoderLayer
from budgetformer.model.step0 import ExitHead, TfidfHead, exit_evidence
from budgetformer.model.tfidf import STEP0_TENSORS, StepZero, evidence


class Encoder(nn.Module):
    """Embeddings and encoder layers, created by `build`."""

    config: Architecture
    embeddings: Embeddings
    decision: BudgetDecision | None
    layers: nn.ModuleList
    final_norm: nn.Module
    distances: nn.Embedding | None
    distance_norm: nn.Module

    def build(self, config: Architecture) -> None:
        """Create the embeddings, the layers and, with scope "input", the budget decision."""
        self.config = config
        self.embeddings = Embeddings(config)
        self.decision = BudgetDecision(config) if config.budget_scope == "input" else None
        self.layers = nn.ModuleList(
            EncoderLayer(config, i) for i in range(config.num_hidden_layers)
        )
        width, eps = config.hidden_size, config.layer_norm_eps
        pre = config.norm_position == "pre"
        self.final_norm = nn.LayerNorm(width, eps=eps) if pre else nn.Identity()
        scores_distances = config.relative_positions == "disentangled"
        rows = 2 * config.relative_span
        self.distances = nn.Embedding(rows, width) if scores_distances else None
        normed = scores_distances and config.relative_norm
        self.distance_norm = nn.LayerNorm(width, eps=eps) if normed else nn.Identity()

    def embed(self, input_ids: Tensor, token_type_ids: Tensor | None) -> Tensor:
        """Embed ids [B, T] into states [B, T, D].

        Raises:
            ValueError: T exceeds the network's positions.
        """
        length = input_ids.shape[1]
        if length > self.config.max_position_embeddings:
            raise ValueError(
                f"the text has {length} tokens, but the network has only "
                f"{self.config.max_position_embeddings} positions"
            )
        if token_type_ids is None:
            token_type_ids = torch.zeros_like(input_ids)
        positions = torch.arange(length, device=input_ids.device).expand_as(input_ids)
        return cast(Tensor, self.embeddings(input_ids, token_type_ids, positions))

    def embedded_distances(self) -> Tensor | None:
        """Return the distance embeddings [2S, D]; None if the layers do not use them."""
        if self.distances is None:
            return None
        return cast(Tensor, self.distance_norm(self.distances.weight))

    def run_at(
        self,
        step: int,
        input_ids: Tensor,
        attention_mask: Tensor,
        token_type_ids: Tensor | None = None,
        layers: int | None = None,
    ) -> Tensor:
        """Run a padded batch [B, T] at one ladder step, computing only that step's heads.

        With ranked heads, a step uses the first heads of each layer, that is the first rows and
        columns of its weights. States and gradients equal those of `forward`, in less time.

        Args:
            step: ladder step, 1 or more.
            input_ids, attention_mask, token_type_ids: see `forward`.
            layers: number of layers to run; None: all, and the final norm.

        Returns:
            States [B, T, D].

        Raises:
            ValueError: the network picks heads per input or per layer, or has no such step.
        """
        config = self.config
        if config.head_selection != "ranked" or config.budget_scope != "input":
            raise ValueError(
                'run_at requires head_selection "ranked" and budget_scope "input", not '
                f'"{config.head_selection}" and "{config.budget_scope}"'
            )
        states, bias = self.embed(input_ids, token_type_ids), additive_mask(attention_mask)
        distances = self.embedded_distances()
        plan = config.heads_per_layer(step)
        for layer, num_heads in list(zip(self.encoder_layers, plan, strict=True))[:layers]:
            states = layer.run_first_heads(states, bias, num_heads, distances)
        return states if layers is not None else cast(Tensor, self.final_norm(states))

    def pool(self, states: Tensor, attention_mask: Tensor) -> Tensor:
        """Turn states [B, T, D] into one vector per item [B, D]."""
        if self.config.pooling == "cls":
            return (states[:, :1] * attention_mask[:, :1, None]).sum(1)
        return masked_mean(states, attention_mask)

    @property
    def encoder_layers(self) -> list[EncoderLayer]:
        """The layers, first to last."""
        return [cast(EncoderLayer, layer) for layer in self.layers]


def additive_mask(attention_mask: Tensor) -> Tensor:
    """Return the additive score mask [B, 1, 1, T] for a mask [B, T] of real tokens."""
    # A large finite number, because a row of -inf (an item without tokens) would turn into NaN.
    return torch.where(attention_mask[:, None, None, :] > 0, 0.0, -1e9)


class SequenceClassifier(nn.Module):
    """Encoder, classification head and step 0, without any dependency on Transformers.

    `load_weights` creates one directly; the Transformers model inherits from it. Both call `build`.
    """

    config: Architecture
    encoder: Encoder
    head: nn.Linear | None
    head_norm: nn.Module
    classifier: nn.Linear
    exit_head: ExitHead | TfidfHead | None

    def build(self, encoder: Encoder, config: Architecture) -> None:
        """Create the classification head and, if configured, step 0 for an encoder."""
        self.config = config
        self.encoder = encoder
        rate = config.classifier_dropout
        self.dropout = nn.Dropout(config.hidden_dropout_prob if rate is None else rate)
        width = config.hidden_size
        self.head = None if config.head_activation is None else nn.Linear(width, width)
        self._activation = activation(config.head_activation or "tanh")
        normed = config.head_norm
        self.head_norm = nn.LayerNorm(width, eps=config.layer_norm_eps) if normed else nn.Identity()
        self.classifier = nn.Linear(width, config.num_classes)
        self.exit_head = None
        if config.embedding_exit:
            self.exit_head = TfidfHead(config) if config.exit_tfidf else ExitHead(config)

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.classifier.weight.device

    def logits_at(
        self,
        step: int,
        input_ids: Tensor,
        attention_mask: Tensor,
        token_type_ids: Tensor | None = None,
    ) -> Tensor:
        """Return the encoder's logits [B, C] at one ladder step, not combined with step 0's.

        Arguments and errors are those of `Encoder.run_at`.
        """
        states = self.encoder.run_at(step, input_ids, attention_mask, token_type_ids)
        return self.classify(self.dropout(self.encoder.pool(states, attention_mask)))

    def step0(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return step 0's logits [B, C] for ids [B, T], and f_o's features of them [B, E].

        Raises:
            ValueError: the network has no step 0.
        """
        problem_type = self.config.problem_type
        if isinstance(self.exit_head, TfidfHead):
            logits = self.exit_head(input_ids, attention_mask, token_type_ids)
            lengths = attention_mask.sum(1).numpy(force=True)
            features = evidence(logits.numpy(force=True), lengths, problem_type)
            return logits, torch.from_numpy(features).to(logits.device)
        if self.exit_head is None:
            raise ValueError("the network has no step 0")
        logits = self.exit_head(input_ids, attention_mask)
        return logits, exit_evidence(logits.detach(), problem_type)

    def step0_with_numpy(self) -> StepZero | None:
        """Return the NumPy form of step 0 and f_o; None if f_o reads more than step 0's answer."""
        if not isinstance(self.exit_head, TfidfHead) or self.encoder.decision is None:
            return None
        state = self.state_dict()
        names = [name for name in state if name.startswith(STEP0_TENSORS)]
        return StepZero.of(self.config, {name: state[name].cpu().numpy() for name in names})

    def classify(self, pooled: Tensor) -> Tensor:
        """Map pooled states [B, D] to the encoder's logits [B, C], not combined with step 0's."""
        if self.head is not None:
            pooled = self.head_norm(self._activation(self.head(pooled)))
        return cast(Tensor, self.classifier(pooled))
