"""Baselines of the compact pass: the dense network in Transformers and in ONNX Runtime.

They pad each batch to its longest text, as is usual with these libraries.
"""

from __future__ import annotations

import importlib.util
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from budgetformer.bench.timing import Contender, TokenIds
from budgetformer.model.embeddings import masked_mean
from budgetformer.model.modeling import BudgetFormerForSequenceClassification

DENSE = "dense, Transformers sdpa"
DENSE_BFLOAT16 = "dense, Transformers sdpa bfloat16"
ONNX_FLOAT32 = "dense, ONNX Runtime float32"
ONNX_INT8 = "dense, ONNX Runtime int8"
NAMES = ("input_ids", "attention_mask", "token_type_ids")
"""Inputs of the dense twin."""


class DenseTwin(nn.Module):
    """The full step of a network as a BERT of Transformers with the same weights.

    Raises:
        ValueError: the network is not a BERT with mean pooling.
    """

    def __init__(self, model: BudgetFormerForSequenceClassification) -> None:
        super().__init__()
        config = model.config
        if config.norm_position != "post" or config.pooling != "mean":
            raise ValueError(
                "the dense baseline requires a post-norm network with mean pooling, not "
                f"{config.norm_position!r} and {config.pooling!r}"
            )
        bert = BertConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            intermediate_size=config.intermediate_size,
            hidden_act=config.hidden_act,
            max_position_embeddings=config.max_position_embeddings,
            type_vocab_size=config.type_vocab_size,
            layer_norm_eps=config.layer_norm_eps,
        )
        bert._attn_implementation = "sdpa"
        self.bert = BertModel(bert, add_pooling_layer=False)
        _copy_encoder(model, self.bert)
        self.classify = model.classify

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> Tensor:
        """Classify padded ids [B, T] into logits [B, C]."""
        states = self.bert(
            input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids
        ).last_hidden_state
        return self.classify(masked_mean(states, attention_mask))


def bfloat16_twin(model: BudgetFormerForSequenceClassification) -> DenseTwin:
    """Return the dense twin with its encoder in bfloat16, in evaluation mode."""
    twin = DenseTwin(model).eval()
    twin.bert.bfloat16()
    twin.classify = lambda pooled: model.classify(pooled.float())
    return twin


def _copy_encoder(model: BudgetFormerForSequenceClassification, bert: Any) -> None:
    ours, theirs = model.encoder.embeddings, bert.embeddings
    pairs: list[tuple[Any, Any]] = [
        (ours.word, theirs.word_embeddings),
        (ours.position, theirs.position_embeddings),
        (ours.segment, theirs.token_type_embeddings),
        (ours.norm, theirs.LayerNorm),
    ]
    for layer, twin in zip(model.encoder.encoder_layers, bert.encoder.layer, strict=True):
        attention, net = layer.attention, layer.feed_forward
        pairs += [
            (attention.query, twin.attention.self.query),
            (attention.key, twin.attention.self.key),
            (attention.value, twin.attention.self.value),
            (attention.output, twin.attention.output.dense),
            (layer.attention_norm, twin.attention.output.LayerNorm),
            (net.up, twin.intermediate.dense),
            (net.down, twin.output.dense),
            (layer.feed_forward_norm, twin.output.LayerNorm),
        ]
    for source, target in pairs:
        target.load_state_dict(source.state_dict())


def padded(items: Sequence[TokenIds]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pad items to the longest; return ids, attention mask and segment ids (0), [B, T] each."""
    longest = max(len(ids) for ids in items)
    ids = np.zeros((len(items), longest), np.int64)
    mask = np.zeros_like(ids)
    for row, item in enumerate(items):
        ids[row, : len(item)] = item
        mask[row, : len(item)] = 1
    return ids, mask, np.zeros_like(ids)


def baseline_contenders(
    model: BudgetFormerForSequenceClassification, threads: int, bfloat16: bool
) -> Iterator[Contender]:
    """Yield the dense network in Transformers and, if installed, in ONNX Runtime.

    Args:
        model: network whose full step the baselines compute.
        threads: number of threads of ONNX Runtime; torch's number is unchanged.
        bfloat16: whether to add Transformers in bfloat16.

    Raises:
        ValueError: the network is not a BERT with mean pooling.
    """
    twin = DenseTwin(model).eval()
    yield _torch_contender(DENSE, twin)
    if bfloat16:
        yield _torch_contender(DENSE_BFLOAT16, bfloat16_twin(model))
    if all(importlib.util.find_spec(name) for name in ("onnx", "onnxruntime", "onnxscript")):
        yield from _onnx_contenders(twin, threads)


def _torch_contender(name: str, twin: DenseTwin) -> Contender:
    @torch.inference_mode()
    def run(items: Sequence[TokenIds]) -> object:
        return twin(*map(torch.from_numpy, padded(items)))

    return Contender(name, run)


def _onnx_contenders(twin: DenseTwin, threads: int) -> Iterator[Contender]:
    def contender(name: str, path: Path) -> Contender:
        session = onnx_session(path, threads)

        def run(items: Sequence[TokenIds]) -> object:
            return session.run(None, dict(zip(NAMES, padded(items), strict=True)))

        return Contender(name, run)

    with tempfile.TemporaryDirectory() as folder:
        float32, int8 = export_onnx(twin, Path(folder))
        yield contender(ONNX_FLOAT32, float32)
        yield contender(ONNX_INT8, int8)


def export_onnx(
    network: nn.Module, folder: Path, inputs: Sequence[str] = NAMES
) -> tuple[Path, Path]:
    """Write a network for ONNX Runtime; return the file in float32 and the file in int8.

    Args:
        network: network with integer inputs [B, T].
        folder: folder to which `plain.onnx` (float32) and `int8.onnx` are written.
        inputs: names of the network's inputs.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    float32, int8 = folder / "plain.onnx", folder / "int8.onnx"
    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("tokens")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter warns about its own internals
        torch.onnx.export(
            network,
            (),
            float32,
            kwargs={name: torch.ones(2, 9, dtype=torch.long) for name in inputs},
            input_names=list(inputs),
            output_names=("logits",),
            dynamic_shapes=dict.fromkeys(inputs, sizes),
            external_data=False,
            verbose=False,
        )
    quantize_dynamic(float32, int8, per_channel=True, weight_type=QuantType.QInt8)
    return float32, int8


def onnx_session(path: Path, threads: int) -> Any:
    """Return a session of ONNX Runtime for a network's file."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
