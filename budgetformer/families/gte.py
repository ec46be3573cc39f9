"""GTE (Zhang et al., 2024): NomicBERT's layers, with biases."""

from dataclasses import replace

from budgetformer.families.nomic_bert import NOMIC_BERT

GTE = replace(
    NOMIC_BERT,
    model_type="gte",
    architecture="GteForSequenceClassification",
    prefix="gte.",
    head={"gte.pooler.dense": "head", "classifier": "classifier"},
)
FAMILIES = [GTE]
