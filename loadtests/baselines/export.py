"""Export the dense twin of a checkpoint for other servers.

    python loadtests/baselines/export.py model_store/ag_news/3 build/baselines/networks/ag_news-3

The dense twin is the checkpoint's full step as a BERT with the same weights, so its answers are
those of this service at full budget. The folder has a Transformers model, and the network for ONNX
Runtime: `plain.onnx` in float32, and `int8.onnx`.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from safetensors.torch import save_file

from budgetformer.bench.dense_twin import DenseTwin, export_onnx
from budgetformer.checkpoint.store import Checkpoint, load_tokenizer, read_checkpoint
from budgetformer.model.modeling import load_model

CODE, NETWORK = Path(__file__).with_name("mean_bert.py"), "MeanBertForSequenceClassification"


def export(checkpoint: Checkpoint, folder: Path) -> None:
    """Write all files to `folder`."""
    model = load_model(checkpoint.path)
    if model.head is not None:
        raise ValueError(
            f"{checkpoint.label} has a layer before its classifier, which mean_bert.py does not "
            "support"
        )
    twin = DenseTwin(model).eval()
    export_onnx(twin, folder)
    weights = twin.state_dict() | {
        f"classifier.{name}": weight for name, weight in model.classifier.state_dict().items()
    }
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    shutil.copy(CODE, folder)
    tokenizer = load_tokenizer(checkpoint)
    tokenizer.enable_padding(pad_id=tokenizer.token_to_id("[PAD]"), pad_token="[PAD]")
    tokenizer.save(str(folder / "tokenizer.json"))
    labels = checkpoint.manifest.labels
    config = {
        "architectures": [NETWORK],
        "auto_map": {
            "AutoModelForSequenceClassification": "mean_bert.MeanBertForSequenceClassification"
        },
        "id2label": dict(enumerate(labels)),
        "label2id": {label: number for number, label in enumerate(labels)},
    }
    write(folder / "config.json", twin.bert.config.to_dict() | config)
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": checkpoint.manifest.max_tokens,
        "model_input_names": ["input_ids", "attention_mask"],
        "pad_token": "[PAD]",
    }
    write(folder / "tokenizer_config.json", tokenizer_config)


def write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("folder", type=Path)
    given = parser.parse_args()
    given.folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=given.folder.parent) as unfinished:
        export(read_checkpoint(given.checkpoint), Path(unfinished))
        shutil.copytree(unfinished, given.folder)


if __name__ == "__main__":
    main()
