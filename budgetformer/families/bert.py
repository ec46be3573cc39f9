"""BERT (Devlin et al., 2019), also MiniLM and other encoders with the same layers.

Maps go from Transformers' names to ours. Names of the head include the prefix `bert.`.
"""

from budgetformer.families.family import Family, cls_head, same

BERT = Family(
    model_type="bert",
    architecture="BertForSequenceClassification",
    prefix="bert.",
    layers="encoder.layer",
    names={
        "embeddings.word_embeddings": "embeddings.word",
        "embeddings.position_embeddings": "embeddings.position",
        "embeddings.token_type_embeddings": "embeddings.segment",
        "embeddings.LayerNorm": "embeddings.norm",
    },
    layer={
        "attention.self.query": "attention.query",
        "attention.self.key": "attention.key",
        "attention.self.value": "attention.value",
        "attention.output.dense": "attention.output",
        "attention.output.LayerNorm": "attention_norm",
        "intermediate.dense": "feed_forward.up",
        "output.dense": "feed_forward.down",
        "output.LayerNorm": "feed_forward_norm",
    },
    head={"bert.pooler.dense": "head", "classifier": "classifier"},
    sizes=same(
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
        "hidden_act",
        "max_position_embeddings",
        "layer_norm_eps",
        "hidden_dropout_prob",
        "attention_probs_dropout_prob",
        "pad_token_id",
    ),
    head_choices=cls_head("tanh"),
)
FAMILIES = [BERT]
