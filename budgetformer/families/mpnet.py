"""MPNet (Song et al., 2020): BERT's layers with T5's relative position bias."""

from typing import Any

from budgetformer.families.bert import BERT
from budgetformer.families.family import Family, Weights, cls_head

BUCKETS, MAX_DISTANCE = 32, 128
"""The values that Transformers uses; it ignores the configuration here."""
_BIAS = "encoder.relative_attention_bias.weight"


def _choices(_: Any) -> dict[str, Any]:
    return {
        "relative_positions": "bias",
        "relative_buckets": BUCKETS,
        "relative_distance": MAX_DISTANCE,
    }


def _copy_bias(weights: Weights, config: Any) -> Weights:
    """Give each layer its own copy of the shared bias, because each layer orders its heads."""
    copied = {name: weight for name, weight in weights.items() if name != _BIAS}
    for index in range(config.num_hidden_layers):
        copied[f"encoder.layer.{index}.distance_bias.weight"] = weights[_BIAS][:BUCKETS].clone()
    return copied


MPNET = Family(
    model_type="mpnet",
    architecture="MPNetForSequenceClassification",
    prefix="mpnet.",
    layers="encoder.layer",
    names={
        "embeddings.word_embeddings": "embeddings.word",
        "embeddings.position_embeddings": "embeddings.position",
        "embeddings.LayerNorm": "embeddings.norm",
    },
    layer={
        "attention.attn.q": "attention.query",
        "attention.attn.k": "attention.key",
        "attention.attn.v": "attention.value",
        "attention.attn.o": "attention.output",
        "attention.LayerNorm": "attention_norm",
        "distance_bias": "attention.distance_bias",
        "intermediate.dense": "feed_forward.up",
        "output.dense": "feed_forward.down",
        "output.LayerNorm": "feed_forward_norm",
    },
    head={"classifier.dense": "head", "classifier.out_proj": "classifier"},
    sizes=BERT.sizes,
    choices=_choices,
    head_choices=cls_head("tanh"),
    adapt=_copy_bias,
    refuse=lambda c: (
        f"relative_attention_num_buckets is less than {BUCKETS}"
        if c.relative_attention_num_buckets < BUCKETS
        else None
    ),
    positions_after_padding=True,
    has_types=False,
)
FAMILIES = [MPNET]
