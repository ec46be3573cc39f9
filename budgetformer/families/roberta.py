"""RoBERTa (Liu et al., 2019), and XLM-RoBERTa and CamemBERT, which differ in their vocabularies."""

from dataclasses import replace

from budgetformer.families.bert import BERT

ROBERTA = replace(
    BERT,
    model_type="roberta",
    architecture="RobertaForSequenceClassification",
    prefix="roberta.",
    head={"classifier.dense": "head", "classifier.out_proj": "classifier"},
    positions_after_padding=True,
)
XLM_ROBERTA = replace(
    ROBERTA, model_type="xlm-roberta", architecture="XLMRobertaForSequenceClassification"
)
CAMEMBERT = replace(
    ROBERTA, model_type="camembert", architecture="CamembertForSequenceClassification"
)
FAMILIES = [ROBERTA, XLM_ROBERTA, CAMEMBERT]
