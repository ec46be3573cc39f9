"""The families of pretrained encoders that can be converted: one file for each.

A file says how a family names its weights and sizes, and what its layers compute; nothing else in
the library knows a family. `docs/families.md` shows how to add one.
"""

from budgetformer.families import (
    albert,
    bert,
    deberta,
    distilbert,
    electra,
    gte,
    megatron_bert,
    modernbert,
    mpnet,
    nomic_bert,
    roberta,
)
from budgetformer.families.family import Family

_FILES = (
    *(albert, bert, deberta, distilbert, electra),
    *(gte, megatron_bert, modernbert, mpnet, nomic_bert, roberta),
)
FAMILIES: dict[str, Family] = {
    family.model_type: family for file in _FILES for family in file.FAMILIES
}
"""By `model_type` in `config.json`."""
