"""ALBERT (Lan et al., 2020): narrow embeddings, and layers that share their weights.

Every layer gets its own copy of the shared weights, because budgets order the heads of each layer.
"""

from dataclasses import replace
from typing import Any

from budgetformer.families.bert import BERT
from budgetformer.families.family import Weights, accept, cls_head

_GROUP = "encoder.albert_layer_groups."


def _choices(config: Any) -> dict[str, Any]:
    layers = config.num_hidden_layers * config.inner_group_num
    return {"embedding_size": config.embedding_size, "num_hidden_layers": layers}


def _copy_shared(weights: Weights, config: Any) -> Weights:
    copied = {name: w for name, w in weights.items() if not name.startswith(_GROUP)}
    inner, layers = config.inner_group_num, config.num_hidden_layers
    for index in range(layers):
        group = int(index / (layers / config.num_hidden_groups))
        for inner_index in range(inner):
            theirs = f"{_GROUP}{group}.albert_layers.{inner_index}."
            ours = f"layers.{index * inner + inner_index}."
            for name, weight in weights.items():
                if name.startswith(theirs):
                    copied[ours + name.removeprefix(theirs)] = weight
    return copied


ALBERT = replace(
    BERT,
    model_type="albert",
    architecture="AlbertForSequenceClassification",
    prefix="albert.",
    layers="layers",
    names=dict(BERT.names) | {"encoder.embedding_hidden_mapping_in": "embeddings.map"},
    layer={
        "attention.query": "attention.query",
        "attention.key": "attention.key",
        "attention.value": "attention.value",
        "attention.dense": "attention.output",
        "attention.LayerNorm": "attention_norm",
        "ffn": "feed_forward.up",
        "ffn_output": "feed_forward.down",
        "full_layer_layer_norm": "feed_forward_norm",
    },
    head={"albert.pooler": "head", "classifier": "classifier"},
    choices=_choices,
    refuse=accept,
    head_choices=cls_head("tanh"),
    adapt=_copy_shared,
    first_layer=f"{_GROUP}0.albert_layers.0",
)
FAMILIES = [ALBERT]
