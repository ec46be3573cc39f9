"""DeBERTa-v2 and v3 (He et al., 2021): disentangled attention."""

from dataclasses import replace
from typing import Any

from budgetformer.families.bert import BERT
from budgetformer.families.family import refuse_narrow_embeddings


def _choices(config: Any) -> dict[str, Any]:
    max_distance = config.max_relative_positions
    normed = str(getattr(config, "norm_rel_ebd", "none")).lower()
    choices: dict[str, Any] = {"position_embeddings": config.position_biased_input}
    if config.relative_attention:
        choices |= {
            "relative_positions": "disentangled",
            "relative_buckets": max(getattr(config, "position_buckets", -1), 0),
            "relative_distance": config.max_position_embeddings
            if max_distance < 1
            else max_distance,
            "relative_terms": list(config.pos_att_type or ()),
            "relative_shares_maps": getattr(config, "share_att_key", False),
            "relative_norm": "layer_norm" in [part.strip() for part in normed.split("|")],
        }
    return choices


def _refuse(config: Any) -> str | None:
    width = config.hidden_size
    if getattr(config, "conv_kernel_size", 0) > 0:
        return "a convolution after the first layer (conv_kernel_size) cannot be converted"
    if config.pos_att_type and not config.relative_attention:
        return "pos_att_type without relative_attention cannot be converted"
    size = width // config.num_attention_heads
    if getattr(config, "attention_head_size", size) != size:
        return f"attention_head_size is not {size}"
    return refuse_narrow_embeddings(config)


DEBERTA = replace(
    BERT,
    model_type="deberta-v2",
    architecture="DebertaV2ForSequenceClassification",
    prefix="deberta.",
    names=dict(BERT.names)
    | {"encoder.rel_embeddings": "distances", "encoder.LayerNorm": "distance_norm"},
    layer=dict(BERT.layer)
    | {
        "attention.self.query_proj": "attention.query",
        "attention.self.key_proj": "attention.key",
        "attention.self.value_proj": "attention.value",
        "attention.self.pos_key_proj": "attention.position_key",
        "attention.self.pos_query_proj": "attention.position_query",
    },
    head={"pooler.dense": "head", "classifier": "classifier"},
    choices=_choices,
    head_choices=lambda c: {"pooling": "cls", "head_activation": c.pooler_hidden_act},
    refuse=_refuse,
    extra_keys=frozenset(
        {
            *("position_buckets", "norm_rel_ebd", "share_att_key", "pooler_hidden_size"),
            *("conv_kernel_size", "attention_head_size", "cls_dropout"),
        }
    ),
)
FAMILIES = [DEBERTA]
