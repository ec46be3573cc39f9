"""NomicBERT (Nussbaum et al., 2024): BERT's order of norms, gated nets and rotary positions."""

from typing import Any

from budgetformer.families.bert import BERT
from budgetformer.families.family import Family, cls_head, rotary_base


def _choices(config: Any) -> dict[str, Any]:
    base = rotary_base(config.rope_parameters)
    return {
        "gated_ffn": True,
        "position_embeddings": False,
        "rotary_bases": [base] * config.num_hidden_layers,
    }


def _refuse(config: Any) -> str | None:
    size = config.hidden_size // config.num_attention_heads
    given = getattr(config, "head_dim", None) or size
    return None if given == size else f"head_dim is {given}, not {size}"


NOMIC_BERT = Family(
    model_type="nomic_bert",
    architecture="NomicBertForSequenceClassification",
    prefix="nomic_bert.",
    layers="layers",
    names={
        "embeddings.word_embeddings": "embeddings.word",
        "embeddings.token_type_embeddings": "embeddings.segment",
        "embeddings.LayerNorm": "embeddings.norm",
    },
    layer={
        "self_attn.q_proj": "attention.query",
        "self_attn.k_proj": "attention.key",
        "self_attn.v_proj": "attention.value",
        "self_attn.o_proj": "attention.output",
        "post_attention_layernorm": "attention_norm",
        "mlp.gate_proj": "feed_forward.gate",
        "mlp.up_proj": "feed_forward.up",
        "mlp.down_proj": "feed_forward.down",
        "post_mlp_layernorm": "feed_forward_norm",
    },
    head={"nomic_bert.pooler.dense": "head", "classifier": "classifier"},
    sizes=BERT.sizes,
    choices=_choices,
    head_choices=cls_head("tanh"),
    refuse=_refuse,
)
FAMILIES = [NOMIC_BERT]
