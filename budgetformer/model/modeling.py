"""The reference BudgetFormer network as a Transformers model.

The modules beside this one define its parts. This one combines, loads and saves them.

Shapes: B items, T tokens, D width, H heads, L layers, C labels.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForSequenceClassification, PreTrainedModel
from transformers.utils import logging as hf_logging
from transformers.utils.generic import ModelOutput

from budgetformer.model.answers import fuse
from budgetformer.model.architecture import MULTI_LABEL
from budgetformer.model.budget import BudgetDecision, Gating, HeadGates, budget_step
from budgetformer.model.configuration import BudgetFormerConfig
from budgetformer.model.embeddings import masked_mean
from budgetformer.model.encoder import Encoder, SequenceClassifier, additive_mask


@dataclass
class BudgetFormerModelOutput(ModelOutput):
    """The output of the encoder.

    Attributes:
        last_hidden_state: states [B, T, D].
        pooled: pooled states [B, D].
        budget: f_o's s, [B, 1]; [B, L] if the layers decide.
        relevance: g_d's relevance of each head, [B, L, H]; None with ranked heads.
        gates: factor of each head, [B, L, H].
    """

    last_hidden_state: Tensor | None = None
    pooled: Tensor | None = None
    budget: Tensor | None = None
    relevance: Tensor | None = None
    gates: Tensor | None = None


@dataclass
class BudgetFormerClassifierOutput(ModelOutput):
    """The output of the classifier.

    Attributes:
        loss: loss, if labels were given.
        logits: logits [B, C].
        exit_logits: step 0's logits [B, C]; None without a step 0.
        budget, relevance, gates: see `BudgetFormerModelOutput`.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    exit_logits: Tensor | None = None
    budget: Tensor | None = None
    relevance: Tensor | None = None
    gates: Tensor | None = None


class BudgetFormerPreTrainedModel(PreTrainedModel):
    """Base class that loads, saves and initialises networks as Transformers does."""

    config_class = BudgetFormerConfig
    config: BudgetFormerConfig
    base_model_prefix = "encoder"
    supports_gradient_checkpointing = False
    _supports_sdpa = True

    def set_gating(self, gating: Gating) -> None:
        """Set how every `BudgetDecision` of this network turns budgets into gates in training."""
        for module in self.modules():
            if isinstance(module, BudgetDecision):
                module.gating = gating


class BudgetFormerModel(  # type: ignore[misc]  # their configurations differ
    Encoder, BudgetFormerPreTrainedModel
):
    """Embeddings and encoder layers; the budget is decided once per input or once per layer."""

    def __init__(self, config: BudgetFormerConfig) -> None:
        super().__init__(config)
        self.build(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Return the word embeddings."""
        return self.embeddings.word

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the word embeddings."""
        self.embeddings.word = cast(nn.Embedding, value)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        steps: Tensor | int | None = None,
        gates: Tensor | None = None,
        evidence: Tensor | None = None,
        **_: Any,
    ) -> BudgetFormerModelOutput:
        """Encode ids [B, T].

        Args:
            input_ids: token ids [B, T].
            attention_mask: 1 for real tokens, 0 for padding, [B, T]; None: all real.
            token_type_ids: segment ids [B, T]; None: all 0.
            steps: ladder step of each item [B], or one for all; overrides f_o.
            gates: factors of the heads [B, L, H]; overrides f_o and g_d. Steps then only select
                the weights of step 0's and the encoder's logits.
            evidence: f_o's features of step 0's answer, [B, E].
        """
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        if isinstance(steps, int):
            steps = torch.full((input_ids.shape[0],), steps, device=input_ids.device)
        states = self.embed(input_ids, token_type_ids)
        bias, distances = additive_mask(attention_mask), self.embedded_distances()
        decisions: list[HeadGates] = []
        if self.decision is not None:
            decisions.append(self.decision(masked_mean(states, attention_mask), steps, evidence))
        for index, layer in enumerate(self.encoder_layers):
            if layer.decision is not None:
                decisions.append(layer.decision(masked_mean(states, attention_mask), steps))
                layer_gates = decisions[-1].gates[:, 0]
            else:
                layer_gates = decisions[0].gates[:, index]
            if gates is not None:
                layer_gates = gates[:, index]
            states = layer(states, bias, layer_gates, distances)
        states = self.final_norm(states)
        pooled = self.pool(states, attention_mask)
        relevance = [d.relevance for d in decisions if d.relevance is not None]
        return BudgetFormerModelOutput(
            last_hidden_state=states,
            pooled=pooled,
            budget=torch.stack([d.budget for d in decisions], dim=1),
            relevance=torch.cat(relevance, dim=1) if relevance else None,
            gates=torch.cat([d.gates for d in decisions], dim=1) if gates is None else gates,
        )


class BudgetFormerForSequenceClassification(  # type: ignore[misc]  # their configurations differ
    SequenceClassifier, BudgetFormerPreTrainedModel
):
    """A BudgetFormer encoder with a classifier for single-label, multi-label and text pairs."""

    def __init__(self, config: BudgetFormerConfig) -> None:
        super().__init__(config)
        self.build(BudgetFormerModel(config), config)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
        steps: Tensor | int | None = None,
        gates: Tensor | None = None,
        step0: tuple[Tensor, Tensor] | None = None,
        **_: Any,
    ) -> BudgetFormerClassifierOutput:
        """Classify ids [B, T]; arguments as for `BudgetFormerModel.forward`.

        Args:
            labels: class ids [B], or 0/1 targets [B, C] when multi-label; adds the loss.
            step0: result of `SequenceClassifier.step0` for longer parts of the texts than
                `input_ids`; None: computed from `input_ids`.
        """
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        if isinstance(steps, int):
            steps = torch.full((input_ids.shape[0],), steps, device=input_ids.device)
        exit_logits = evidence = None
        if self.exit_head is not None:
            exit_logits, evidence = (
                self.step0(input_ids, attention_mask, token_type_ids) if step0 is None else step0
            )
        encoded = self.encoder(
            input_ids, attention_mask, token_type_ids, steps=steps, gates=gates, evidence=evidence
        )
        logits = self.classify(self.dropout(encoded.pooled))
        if self.config.budget_scope == "input":
            answering = steps
            if answering is None:
                answering = budget_step(encoded.budget[:, 0], self.config.num_steps)
            encoder_weights, exit_weights = (
                logits.new_tensor([of_step_0, *weights])[answering].unsqueeze(-1)
                for of_step_0, weights in (
                    (1.0, self.config.encoder_weights),
                    (0.0, self.config.exit_weights),
                )
            )
            logits = fuse(logits, exit_logits, encoder_weights, exit_weights)
        if exit_logits is not None and steps is not None and gates is None:
            logits = torch.where((steps == 0).unsqueeze(-1), exit_logits, logits)
        return BudgetFormerClassifierOutput(
            loss=None if labels is None else self.loss(logits, labels),
            logits=logits,
            exit_logits=exit_logits,
            budget=encoded.budget,
            relevance=encoded.relevance,
            gates=encoded.gates,
        )

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the cross-entropy of logits [B, C], or the mean binary one when multi-label."""
        if self.config.problem_type == MULTI_LABEL:
            return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))
        return F.cross_entropy(logits, labels)


@contextmanager
def silence_transformers() -> Iterator[None]:
    """Suppress reports and progress bars of Transformers in this block."""
    verbosity, shown = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity(logging.CRITICAL)
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(verbosity)
        if shown:
            hf_logging.enable_progress_bar()


def load_model(folder: Path) -> BudgetFormerForSequenceClassification:
    """Load the network of a checkpoint folder as a Transformers model, in float32.

    Raises:
        OSError: a file is missing or damaged.
    """
    with silence_transformers():
        model: BudgetFormerForSequenceClassification = (
            BudgetFormerForSequenceClassification.from_pretrained(
                folder, dtype=torch.float32, local_files_only=True, use_safetensors=True
            )
        )
    return model


AutoModel.register(BudgetFormerConfig, BudgetFormerModel, exist_ok=True)
AutoModelForSequenceClassification.register(
    BudgetFormerConfig, BudgetFormerForSequenceClassification, exist_ok=True
)
