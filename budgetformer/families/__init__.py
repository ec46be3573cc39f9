"""The families of pretrained encoders that can be converted, one file each.

A file maps a family's weights and sizes to ours and describes its layers; no other module depends
on a family. `docs/families.md` shows how to add one.
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
"""Families by their `model_type` in `config.json`."""
