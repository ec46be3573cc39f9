"""A BERT that classifies the mean of its tokens, as a custom model of Transformers.

It is exported beside its weights, so that any server of Transformers models can load it.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import BertModel, BertPreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput


class MeanBertForSequenceClassification(BertPreTrainedModel):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.bert = BertModel(config, add_pooling_layer=False)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(self, input_ids: Any, attention_mask: Any, **_: Any) -> SequenceClassifierOutput:
        states = self.bert(input_ids, attention_mask).last_hidden_state
        weights = attention_mask.unsqueeze(-1).to(states.dtype)
        return SequenceClassifierOutput(
            logits=self.classifier((states * weights).sum(1) / weights.sum(1))
        )
