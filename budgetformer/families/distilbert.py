"""DistilBERT (Sanh et al., 2019): BERT's layers under other names, without token types."""

from budgetformer.families.family import Family, cls_head, same

DISTILBERT = Family(
    model_type="distilbert",
    architecture="DistilBertForSequenceClassification",
    prefix="distilbert.",
    layers="transformer.layer",
    names={
        "embeddings.word_embeddings": "embeddings.word",
        "embeddings.position_embeddings": "embeddings.position",
        "embeddings.LayerNorm": "embeddings.norm",
    },
    layer={
        "attention.q_lin": "attention.query",
        "attention.k_lin": "attention.key",
        "attention.v_lin": "attention.value",
        "attention.out_lin": "attention.output",
        "sa_layer_norm": "attention_norm",
        "ffn.lin1": "feed_forward.up",
        "ffn.lin2": "feed_forward.down",
        "output_layer_norm": "feed_forward_norm",
    },
    head={"pre_classifier": "head", "classifier": "classifier"},
    sizes=same("vocab_size", "max_position_embeddings", "pad_token_id")
    | {
        "hidden_size": "dim",
        "num_hidden_layers": "n_layers",
        "num_attention_heads": "n_heads",
        "intermediate_size": "hidden_dim",
        "hidden_act": "activation",
        "hidden_dropout_prob": "dropout",
        "attention_probs_dropout_prob": "attention_dropout",
    },
    head_choices=cls_head("relu"),
    has_types=False,
)
FAMILIES = [DISTILBERT]
