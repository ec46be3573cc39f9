"""ModernBERT (Warner et al., 2024): pre-norm, gated, rotary, and local attention in most layers."""

from typing import Any

from budgetformer.families.family import Family, Weights, rotary_base, same, split_rows

LOCAL = "sliding_attention"


def _choices(config: Any) -> dict[str, Any]:
    kinds = config.layer_types
    return {
        "norm_position": "pre",
        "norm_first_layer": False,
        "norm_embeddings": True,
        "gated_ffn": True,
        "position_embeddings": False,
        "rotary_bases": [rotary_base(config.rope_parameters[kind]) for kind in kinds],
        "windows": [config.sliding_window if kind == LOCAL else 0 for kind in kinds],
    }


def _head(config: Any) -> dict[str, Any]:
    return {
        "pooling": config.classifier_pooling,
        "head_activation": config.classifier_activation,
        "head_norm": True,
    }


def _split(weights: Weights, _: Any) -> Weights:
    weights = split_rows(weights, "Wqkv", ["query", "key", "value"])
    return split_rows(weights, "Wi", ["gate", "up"])


MODERNBERT = Family(
    model_type="modernbert",
    architecture="ModernBertForSequenceClassification",
    prefix="model.",
    layers="layers",
    names={
        "embeddings.tok_embeddings": "embeddings.word",
        "embeddings.norm": "embeddings.norm",
        "final_norm": "final_norm",
    },
    layer={
        "attn.query": "attention.query",
        "attn.key": "attention.key",
        "attn.value": "attention.value",
        "attn.Wo": "attention.output",
        "attn_norm": "attention_norm",
        "mlp.gate": "feed_forward.gate",
        "mlp.up": "feed_forward.up",
        "mlp.Wo": "feed_forward.down",
        "mlp_norm": "feed_forward_norm",
    },
    head={"head.dense": "head", "head.norm": "head_norm", "classifier": "classifier"},
    sizes=same(
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
        "max_position_embeddings",
        "pad_token_id",
    )
    | {
        "hidden_act": "hidden_activation",
        "layer_norm_eps": "norm_eps",
        "hidden_dropout_prob": "mlp_dropout",
        "attention_probs_dropout_prob": "attention_dropout",
    },
    choices=_choices,
    head_choices=_head,
    adapt=_split,
    has_types=False,
)
FAMILIES = [MODERNBERT]
