"""Small random classifiers of every family, saved as Transformers does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from budgetformer.model.modeling import silence_transformers
from tests.support.stores import labelled_sentences
from tests.support.texts import tokenizer_for

LABELS = ["calm", "glad", "sad"]
TEXTS = [text for text, _ in labelled_sentences()[:40]]
SMALL = {
    "vocab_size": 60,
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "max_position_embeddings": 70,
    "initializer_range": 0.3,
}
DISTILBERT = {
    "vocab_size": 60,
    "dim": 24,
    "n_layers": 3,
    "n_heads": 4,
    "hidden_dim": 40,
    "max_position_embeddings": 70,
    "initializer_range": 0.3,
}
V3 = {
    "relative_attention": True,
    "pos_att_type": ["p2c", "c2p"],
    "position_biased_input": False,
    "norm_rel_ebd": "layer_norm",
    "share_att_key": True,
    "type_vocab_size": 0,
}
CONFIGS: dict[str, list[dict[str, Any]]] = {
    "bert": [SMALL, SMALL | {"hidden_act": "relu", "type_vocab_size": 3}],
    "roberta": [SMALL | {"pad_token_id": 1}, SMALL | {"pad_token_id": 3, "type_vocab_size": 1}],
    "xlm-roberta": [SMALL | {"pad_token_id": 1, "type_vocab_size": 1}],
    "camembert": [SMALL | {"pad_token_id": 1, "type_vocab_size": 1}],
    "distilbert": [DISTILBERT, DISTILBERT | {"activation": "relu"}],
    "electra": [SMALL | {"embedding_size": 8}, SMALL | {"embedding_size": 24}],
    "albert": [
        SMALL | {"embedding_size": 8},
        SMALL | {"embedding_size": 24, "num_hidden_groups": 3},
        SMALL | {"embedding_size": 8, "num_hidden_layers": 2, "inner_group_num": 2},
    ],
    "mpnet": [SMALL, SMALL | {"max_position_embeddings": 300}],
    "modernbert": [
        SMALL | {"local_attention": 8, "pad_token_id": 0},
        SMALL | {"local_attention": 4, "pad_token_id": 0, "classifier_pooling": "mean"},
        SMALL
        | {"global_attn_every_n_layers": 2, "pad_token_id": 0, "norm_bias": True, "mlp_bias": True}
        | {"attention_bias": True, "classifier_bias": True, "local_attention": 20},
    ],
    "deberta-v2": [
        SMALL | V3 | {"position_buckets": 8},
        SMALL | V3 | {"position_buckets": -1, "pos_att_type": ["c2p"]},
        SMALL | V3 | {"position_buckets": 16, "share_att_key": False, "norm_rel_ebd": "none"},
        SMALL | V3 | {"position_biased_input": True, "type_vocab_size": 2, "pos_att_type": []},
        SMALL | {"relative_attention": False},
    ],
    "megatron-bert": [SMALL],
    "nomic_bert": [SMALL, SMALL | {"hidden_act": "gelu", "type_vocab_size": 1}],
    "gte": [SMALL | {"pad_token_id": 1}, SMALL | {"pad_token_id": 0, "type_vocab_size": 2}],
}


def make(model_type: str, folder: Path, **sizes: Any) -> PreTrainedModel:
    """Save a small random classifier of a family, none of whose weights are constant."""
    labels = {"id2label": dict(enumerate(LABELS)), "label2id": {n: i for i, n in enumerate(LABELS)}}
    config = AutoConfig.for_model(model_type, **labels | sizes)
    with torch.random.fork_rng(devices=[]), silence_transformers():
        torch.manual_seed(0)
        model: PreTrainedModel = AutoModelForSequenceClassification.from_config(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("bias") or "norm" in name.lower():
                    parameter.add_(0.2 * torch.randn_like(parameter))
        model.save_pretrained(folder)
    return model.eval()


def save_tokenizer(folder: Path, **settings: Any) -> None:
    """Save a tokenizer for the sentences, with padding and truncation in its file."""
    made = tokenizer_for(TEXTS)
    made.enable_padding(length=60)
    made.enable_truncation(7)
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=made, **names | settings).save_pretrained(folder)


def save_classifier(folder: Path, family: str = "bert", **sizes: Any) -> Path:
    """Save a small random classifier with its tokenizer."""
    words = tokenizer_for(TEXTS).get_vocab_size()
    make(family, folder, **CONFIGS[family][0] | sizes | {"vocab_size": words})
    save_tokenizer(folder)
    return folder
