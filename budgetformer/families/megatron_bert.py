"""Megatron-BERT (Shoeybi et al., 2019): BERT with the norms before its maps."""

from dataclasses import replace
from typing import Any

from budgetformer.families.bert import BERT

_NORMS = {"attention.ln": "attention_norm", "ln": "feed_forward_norm"}


def _choices(_: Any) -> dict[str, Any]:
    return {"norm_position": "pre"}


MEGATRON_BERT = replace(
    BERT,
    model_type="megatron-bert",
    architecture="MegatronBertForSequenceClassification",
    names={theirs: ours for theirs, ours in BERT.names.items() if ours != "embeddings.norm"}
    | {"encoder.ln": "final_norm"},
    layer={theirs: ours for theirs, ours in BERT.layer.items() if "norm" not in ours} | _NORMS,
    choices=_choices,
)
FAMILIES = [MEGATRON_BERT]
