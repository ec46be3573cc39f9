"""ELECTRA (Clark et al., 2020): BERT's layers, and embeddings that may be narrower."""

from dataclasses import replace
from typing import Any

from budgetformer.families.bert import BERT
from budgetformer.families.family import accept, cls_head


def _choices(config: Any) -> dict[str, Any]:
    narrow = config.embedding_size != config.hidden_size
    return {"embedding_size": config.embedding_size} if narrow else {}


ELECTRA = replace(
    BERT,
    model_type="electra",
    architecture="ElectraForSequenceClassification",
    prefix="electra.",
    names=dict(BERT.names) | {"embeddings_project": "embeddings.map"},
    head={"classifier.dense": "head", "classifier.out_proj": "classifier"},
    choices=_choices,
    refuse=accept,
    head_choices=cls_head("gelu"),
)
FAMILIES = [ELECTRA]
