"""Conversion of pretrained encoders, and the order of heads by importance."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from budgetformer.errors import CheckpointError
from budgetformer.families.conversion import convert_encoder
from budgetformer.model.architecture import MULTI_LABEL
from budgetformer.model.embeddings import masked_mean
from budgetformer.model.modeling import BudgetFormerForSequenceClassification
from budgetformer.training import importance
from budgetformer.training.importance import ladder_by_importance, order_by_importance
from tests.support.networks import (
    VOCABULARY,
    assert_close,
    pad,
    random_items,
    random_network,
    small_config,
)

NAMES = ["no", "yes", "maybe"]
BERT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "max_position_embeddings": 20,
    "layer_norm_eps": 1e-6,
    "initializer_range": 0.4,
}
LABELS: dict[str, Any] = {
    "id2label": dict(enumerate(NAMES)),
    "label2id": {name: i for i, name in enumerate(NAMES)},
}
BATCH = pad(random_items([5, 12, 1, 8]))


def small_roberta() -> RobertaForSequenceClassification:
    sizes = BERT | {"type_vocab_size": 1, "max_position_embeddings": 22, "pad_token_id": 1}
    return RobertaForSequenceClassification(RobertaConfig(**sizes, **LABELS))


def small_distilbert() -> DistilBertForSequenceClassification:
    config = DistilBertConfig(
        vocab_size=BERT["vocab_size"],
        dim=BERT["hidden_size"],
        n_layers=BERT["num_hidden_layers"],
        n_heads=BERT["num_attention_heads"],
        hidden_dim=BERT["intermediate_size"],
        max_position_embeddings=16,
        initializer_range=0.3,
        **LABELS,
    )
    return DistilBertForSequenceClassification(config)


CLASSIFIERS = {
    "bert": lambda: BertForSequenceClassification(BertConfig(**BERT, **LABELS)),
    "roberta": small_roberta,
    "distilbert": small_distilbert,
}


def random_bert(**changes: Any) -> BertModel:
    torch.manual_seed(0)
    return BertModel(BertConfig(**BERT | changes)).eval()


@pytest.fixture
def encoder_folder(tmp_path: Path) -> Path:
    random_bert().save_pretrained(tmp_path / "bert")
    return tmp_path / "bert"


class TestConversion:
    @pytest.mark.parametrize("activation", ["gelu", "relu"])
    @pytest.mark.parametrize("coupled", [True, False])
    @torch.no_grad()
    def test_the_full_budget_equals_the_encoder(
        self, tmp_path: Path, activation: str, coupled: bool
    ) -> None:
        bert = random_bert(hidden_act=activation)
        bert.save_pretrained(tmp_path)
        model = convert_encoder(tmp_path, NAMES, budget_ffn=coupled).model.eval()
        mask = BATCH["attention_mask"]
        expected = bert(**BATCH).last_hidden_state
        encoded = model.encoder(**BATCH, steps=4)
        assert_close(encoded.last_hidden_state * mask[..., None], expected * mask[..., None])
        assert_close(encoded.pooled, masked_mean(expected, mask))

    @torch.no_grad()
    def test_cls_pooling_reads_the_first_state(self, encoder_folder: Path) -> None:
        model = convert_encoder(encoder_folder, NAMES, pooling="cls").model.eval()
        expected = random_bert()(**BATCH).last_hidden_state[:, 0]
        assert_close(model.encoder(**BATCH, steps=4).pooled, expected)

    @torch.no_grad()
    def test_a_smaller_budget_gives_another_result(self, encoder_folder: Path) -> None:
        model = convert_encoder(encoder_folder, NAMES).model.eval()
        full = model.encoder(**BATCH, steps=4).pooled
        assert not torch.allclose(model.encoder(**BATCH, steps=2).pooled, full, atol=1e-2)

    @pytest.mark.parametrize("family", sorted(CLASSIFIERS))
    @torch.no_grad()
    def test_the_full_budget_equals_the_fine_tuned_classifier(
        self, tmp_path: Path, family: str
    ) -> None:
        torch.manual_seed(0)
        whole = CLASSIFIERS[family]().eval()
        whole.save_pretrained(tmp_path)
        model = convert_encoder(tmp_path, NAMES).model.eval()
        batch = {name: tensor.clone() for name, tensor in BATCH.items()}
        if family != "bert":  # the other families have no segments
            batch["token_type_ids"].zero_()
        given = {k: v for k, v in batch.items() if k != "token_type_ids" or family == "bert"}
        if family == "roberta":  # recognizes padding by its token
            given["input_ids"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, 1)
        assert_close(model(**batch, steps=4).logits, whole(**given).logits)

    @pytest.mark.parametrize("family", sorted(CLASSIFIERS))
    def test_other_labels_get_a_new_classifier(self, tmp_path: Path, family: str) -> None:
        CLASSIFIERS[family]().save_pretrained(tmp_path)
        model = convert_encoder(tmp_path, [*NAMES, "never"]).model
        assert model.classifier.out_features == 4
        assert model.head is None
        assert model.config.pooling == "mean"

    def test_sizes_come_from_the_encoder(self, encoder_folder: Path) -> None:
        config = convert_encoder(encoder_folder, NAMES).model.config
        assert {name: getattr(config, name) for name in BERT if name != "initializer_range"} == {
            name: value for name, value in BERT.items() if name != "initializer_range"
        }
        assert config.norm_position == "post"

    def test_label_names_and_ids_are_kept(self, encoder_folder: Path) -> None:
        model = convert_encoder(encoder_folder, NAMES).model
        assert model.config.id2label == {0: "no", 1: "yes", 2: "maybe"}
        assert model.config.label2id == {"no": 0, "yes": 1, "maybe": 2}
        assert model.classifier.out_features == 3

    def test_choices_reach_the_configuration(self, encoder_folder: Path) -> None:
        ladder = [[0, 1, 0], [4, 4, 4]]
        config = convert_encoder(
            encoder_folder,
            NAMES,
            ladder=ladder,
            embedding_exit=True,
            problem_type=MULTI_LABEL,
            head_selection="input",
            attention_probs_dropout_prob=0.0,
        ).model.config
        assert config.ladder == ladder
        assert config.embedding_exit
        assert config.problem_type == MULTI_LABEL
        assert config.head_selection == "input"
        assert config.attention_probs_dropout_prob == 0.0


def remove_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def remove_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def break_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def break_weights(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"no tensors here")


def rename_model(folder: Path) -> None:
    source = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(source | {"model_type": "gpt2"}))


def drop_tensors(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if "layer.1.output" not in name}
    save_file(kept, folder / "model.safetensors")


def reshape_tensor(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if name.endswith("layer.0.attention.self.query.weight"))
    save_file(weights | {name: torch.zeros(8, 16)}, folder / "model.safetensors")


def list_config(folder: Path) -> None:
    (folder / "config.json").write_text("[]")


class TestErrors:
    @pytest.mark.parametrize(
        ("damage", "message"),
        [
            (remove_config, "not an encoder folder"),
            (remove_weights, "not an encoder folder"),
            (break_config, "not an encoder folder"),
            (break_weights, "not an encoder folder"),
            (
                rename_model,
                "model_type .gpt2. cannot be converted; supported: albert, bert",
            ),
            (list_config, "not an encoder folder"),
            (reshape_tensor, r"layer\.0\.attention\.self\.query\.weight has shape \[8, 16\]"),
            (drop_tensors, r"missing weights: bert\.encoder\.layer\.1\..* and 3 more"),
        ],
    )
    def test_the_error_names_the_folder_and_the_fault(
        self, encoder_folder: Path, damage: Callable[[Path], None], message: str
    ) -> None:
        damage(encoder_folder)
        with pytest.raises(CheckpointError, match=message) as caught:
            convert_encoder(encoder_folder, NAMES)
        assert str(encoder_folder) in str(caught.value)

    def test_a_missing_folder_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="nowhere"):
            convert_encoder(tmp_path / "nowhere", NAMES)


def labelled(problem_type: str | None = None) -> dict[str, Tensor]:
    """Return a batch with labels."""
    labels = torch.tensor([0, 2, 1, 2])
    if problem_type == MULTI_LABEL:
        labels = torch.nn.functional.one_hot(labels, 3)
    return BATCH | {"labels": labels}


@torch.no_grad()
def mute_heads_except(model: BudgetFormerForSequenceClassification, deciding: list[int]) -> None:
    """Make the attention of each layer depend on one head only."""
    size = model.config.head_size
    for layer, head in zip(model.encoder.layers, deciding, strict=True):
        kept = torch.zeros(model.config.hidden_size)
        kept[head * size : (head + 1) * size] = 1
        layer.attention.output.weight.mul_(kept)


class TestImportance:
    @pytest.mark.parametrize(
        "changes",
        [
            {},
            {"norm_position": "pre"},
            {"budget_ffn": False},
            {"pooling": "cls"},
            {"embedding_exit": True, "exit_weight": 0.5},
            {"problem_type": MULTI_LABEL},
            {"budget_scope": "layer"},
        ],
    )
    def test_ordering_keeps_the_full_budget(self, changes: dict[str, Any]) -> None:
        network = random_network(small_config(**changes))
        with torch.no_grad():
            before = network(**BATCH, steps=4).logits
        queries = [layer.attention.query.weight for layer in network.encoder.layers]
        earlier = [query.detach().clone() for query in queries]
        order_by_importance(network, [labelled(network.config.problem_type)] * 2)
        with torch.no_grad():
            assert_close(network(**BATCH, steps=4).logits, before)
        assert not all(map(torch.equal, queries, earlier))

    def test_the_scorer_selects_the_same_heads_after_ordering(self) -> None:
        # without coupled neurons, only the new positions of heads could change an answer
        network = random_network(small_config(head_selection="input", budget_ffn=False))
        with torch.no_grad():
            before = [network(**BATCH, steps=step).logits for step in (1, 2, 3)]
        order_by_importance(network, [labelled()])
        with torch.no_grad():
            for step, logits in zip((1, 2, 3), before, strict=True):
                assert_close(network(**BATCH, steps=step).logits, logits)

    @pytest.mark.parametrize("deciding", [[3, 2, 1], [0, 3, 0], [1, 1, 1]])
    def test_the_deciding_head_comes_first(self, deciding: list[int]) -> None:
        network = random_network(small_config(budget_ffn=False))
        mute_heads_except(network, deciding)
        with torch.no_grad():
            full = network(**BATCH, steps=4).logits
        order_by_importance(network, [labelled()])
        with torch.no_grad():
            assert_close(network(**BATCH, steps=1).logits, full)

    def test_the_deciding_neurons_come_first(self) -> None:
        network = random_network(small_config(num_hidden_layers=1))
        net = network.encoder.layers[0].feed_forward
        mute_heads_except(network, [2])
        with torch.no_grad():
            deciding = torch.zeros(24)
            deciding[[5, 11, 17, 18, 20, 23]] = 1  # one head's share, scattered over all heads
            net.down.weight.mul_(deciding)
            full = network(**BATCH, steps=4).logits
        order_by_importance(network, [labelled()])
        with torch.no_grad():
            assert_close(network(**BATCH, steps=1).logits, full)

    def test_long_batches_are_measured_in_parts(self, monkeypatch: pytest.MonkeyPatch) -> None:
        networks = [random_network(small_config()) for _ in range(2)]
        whole = order_by_importance(networks[0], [labelled()])
        texts, tokens = BATCH["input_ids"].shape
        monkeypatch.setattr(importance, "PASS_TOKENS", 2 * tokens)
        sizes: list[int] = []
        networks[1].register_forward_pre_hook(
            lambda _, __, given: sizes.append(len(given["input_ids"])), with_kwargs=True
        )
        in_parts = order_by_importance(networks[1], [labelled()])
        assert sizes == [2] * (texts // 2) + [1] * (texts % 2)
        torch.testing.assert_close(in_parts, whole)

    @pytest.mark.parametrize("training", [True, False])
    def test_ordering_keeps_the_mode_and_leaves_no_gradient(self, training: bool) -> None:
        network = random_network(small_config()).train(training)
        order_by_importance(network, [labelled()])
        assert network.training == training
        assert all(parameter.grad is None for parameter in network.parameters())

    def test_ordering_leaves_no_hook(self) -> None:
        network = random_network(small_config())
        order_by_importance(network, [labelled()])
        assert not any(module._forward_pre_hooks for module in network.modules())

    def test_ordering_is_repeatable_and_ignores_dropout(self) -> None:
        networks = [random_network(small_config(hidden_dropout_prob=0.5)) for _ in range(2)]
        for network in networks:
            order_by_importance(network.train(), [labelled()])
        first, second = (network.state_dict() for network in networks)
        assert all(torch.equal(first[name], second[name]) for name in first)


class TestLadderByImportance:
    def test_each_step_keeps_the_most_important_heads(self) -> None:
        units = torch.tensor([[9.0, 2.0, 1.0], [8.0, 7.0, 3.0]])
        assert ladder_by_importance(units) == [[1, 1], [1, 3], [3, 3]]

    def test_a_layer_may_get_no_head(self) -> None:
        units = torch.tensor([[1.0, 0.5], [9.0, 8.0]])
        assert ladder_by_importance(units) == [[0, 2], [2, 2]]

    @pytest.mark.parametrize("coupled", [True, False])
    def test_ordering_returns_falling_importance(self, encoder_folder: Path, coupled: bool) -> None:
        model = convert_encoder(encoder_folder, ["a", "b"], budget_ffn=coupled).model
        batch = {
            "input_ids": torch.randint(5, 40, (6, 8)),
            "attention_mask": torch.ones(6, 8, dtype=torch.long),
            "labels": torch.tensor([0, 1] * 3),
        }
        units = order_by_importance(model, [batch])
        config = model.config
        assert units.shape == (config.num_hidden_layers, config.num_attention_heads)
        assert (units.diff(dim=1) <= 0).all()
        assert (units >= 0).all()
        again = order_by_importance(model, [batch])
        torch.testing.assert_close(again, units, rtol=1e-3, atol=1e-6)
