"""The training loop: it learns, repeats, resumes after a power cut, and adds up micro-batches."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from torch import Tensor, nn

from budgetformer.model.architecture import MULTI_LABEL
from budgetformer.model.budget import Gating
from budgetformer.model.encoder import SequenceClassifier
from budgetformer.model.modeling import BudgetFormerForSequenceClassification
from budgetformer.training import trainer as trainer_module
from budgetformer.training.data import Examples, TokenBatch, TokenizedTexts
from budgetformer.training.recipe import Recipe
from budgetformer.training.trainer import Trainer, inputs, split_rows
from tests.support.networks import PROPERTY, new_network
from tests.support.texts import topic_examples

RECIPE = Recipe(
    seed=3,
    max_length=16,
    batch_size=12,
    learning_rate=5e-3,
    dense_epochs=2,
    budget_epochs=2,
    distillation=0.5,
)


class PowerCutError(Exception):
    """Stands for a power cut during training."""


class FailingTexts(TokenizedTexts):
    """Texts that raise `PowerCutError` after a number of batches."""

    batches_left = 10**9

    def batch(self, rows: np.ndarray) -> TokenBatch:
        if self.batches_left == 0:
            raise PowerCutError
        self.batches_left -= 1
        return super().batch(rows)


class Run:
    """One training run in a folder, from the same untrained network every time."""

    def __init__(
        self, folder: Path, tokenizer: Tokenizer, examples: Examples, **changes: Any
    ) -> None:
        self.folder, self.examples = folder, examples
        self.recipe = Recipe(**RECIPE.as_dict() | changes)
        self.tokens = FailingTexts(tokenizer, examples.texts, examples.pairs, 16)
        self.lines: list[str] = []

    def trainer(
        self,
        model: BudgetFormerForSequenceClassification,
        step0: Tensor | None = None,
        micro_batch: int | None = None,
    ) -> Trainer:
        return Trainer(
            model,
            self.tokens,
            self.examples,
            self.recipe,
            self.folder,
            self.lines.append,
            step0=step0,
            micro_batch=micro_batch,
        )

    def weights(self, after: int | None = None, **network: Any) -> dict[str, Tensor]:
        """Train and return the weights; with `after`, the power is cut after this many batches."""
        model = new_network(**network)
        if after is not None:
            self.tokens.batches_left = after
            with pytest.raises(PowerCutError):
                self.trainer(model).train()
            self.tokens.batches_left = 10**9
            # the resumed run has only the folder, so its initial weights must not matter
            model = new_network(seed=99, **network)
            torch.manual_seed(1234)
        self.trainer(model).train()
        return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.fixture
def examples() -> Examples:
    return topic_examples().subset(range(48))


@pytest.fixture
def new_run(tmp_path: Path, tokenizer: Tokenizer, examples: Examples) -> Callable[..., Run]:
    """Return a function that makes runs, each in a folder of its own by default."""
    made: list[Run] = []

    def make(folder: Path | None = None, **changes: Any) -> Run:
        run_folder = folder or tmp_path / str(len(made))
        made.append(Run(run_folder, tokenizer, changes.pop("examples", examples), **changes))
        return made[-1]

    return make


def assert_same_weights(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    differing = [name for name in first if not torch.equal(first[name], second[name])]
    assert differing == []


@torch.no_grad()
def accuracy(run: Run, model: BudgetFormerForSequenceClassification, step: int) -> float:
    answers = run.trainer(model).predict(run.tokens, step, "test").argmax(-1).numpy()
    return float((answers == run.examples.labels).mean())


def mean_loss(run: Run, model: BudgetFormerForSequenceClassification, step: int) -> float:
    logits = run.trainer(model).predict(run.tokens, step, "test")
    return float(model.loss(logits, torch.from_numpy(run.examples.labels)))


class TestLearning:
    @pytest.mark.parametrize("precision", ["fp32", "bf16"])
    def test_loss_falls_at_every_step(self, new_run: Callable[..., Run], precision: str) -> None:
        run, model = new_run(precision=precision, dense_epochs=4, budget_epochs=10), new_network()
        before = [mean_loss(run, model, step) for step in range(1, 5)]
        run.trainer(model).train()
        after = [mean_loss(run, model, step) for step in range(1, 5)]
        assert (np.array(after) / before).max() < 0.5
        assert accuracy(run, model, 4) > 0.9

    @pytest.mark.parametrize(
        "changes",
        [
            {"head_selection": "input"},
            {"budget_scope": "layer", "head_selection": "input"},
            {"budget_ffn": False, "norm_position": "pre"},
            {"ladder": [[0, 1], [1, 2], [4, 4]]},
        ],
    )
    def test_every_kind_of_network_learns(
        self, new_run: Callable[..., Run], changes: dict[str, Any]
    ) -> None:
        run, model = new_run(dense_epochs=3, budget_epochs=3), new_network(**changes)
        full = model.config.num_steps
        before = mean_loss(run, model, full)
        run.trainer(model).train()
        assert mean_loss(run, model, full) < 0.7 * before

    @pytest.mark.parametrize("selection", ["input", "ranked"])
    def test_soft_gates_train_the_budget_controller(
        self, new_run: Callable[..., Run], selection: str
    ) -> None:
        run = new_run(gating="soft", noise=0.5, temperature=(2.0, 0.5), budget_epochs=4)
        model = new_network(head_selection=selection)
        before = mean_loss(run, model, 4)
        controller = model.encoder.decision.controller.out.weight.detach().clone()
        run.trainer(model).train()
        assert mean_loss(run, model, 4) < 0.9 * before
        assert not torch.equal(model.encoder.decision.controller.out.weight, controller)

    def test_multi_label_networks_learn(
        self, new_run: Callable[..., Run], examples: Examples
    ) -> None:
        labels = np.eye(3, dtype=np.int64)[examples.labels]
        several = Examples(examples.texts, None, labels, examples.names)
        run = new_run(examples=several, dense_epochs=4, budget_epochs=4)
        model = new_network(problem_type=MULTI_LABEL)
        before = mean_loss(run, model, 4)
        run.trainer(model).train()
        assert mean_loss(run, model, 4) < 0.7 * before

    def test_controller_and_exit_head_are_not_trained(self, new_run: Callable[..., Run]) -> None:
        model = new_network(embedding_exit=True)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        new_run().trainer(model).train()
        for name, tensor in model.state_dict().items():
            untouched = name.startswith("exit_head") or ".controller." in name
            assert torch.equal(tensor, before[name]) == untouched, name

    @pytest.mark.parametrize("freeze", [True, False])
    def test_budget_training_keeps_frozen_embeddings(
        self, new_run: Callable[..., Run], freeze: bool
    ) -> None:
        model = new_network()
        dense: list[Tensor] = []
        word = model.encoder.embeddings.word.weight
        new_run(freeze_embeddings=freeze).trainer(model).train(
            lambda: dense.append(word.detach().clone())
        )
        assert torch.equal(word, dense[0]) == freeze
        assert word.requires_grad

    def test_without_epochs_only_the_order_of_heads_changes(
        self, new_run: Callable[..., Run]
    ) -> None:
        run, model = new_run(dense_epochs=0, budget_epochs=0), new_network()
        before = mean_loss(run, model, 4)
        run.trainer(model).train()
        assert mean_loss(run, model, 4) == pytest.approx(before, rel=1e-5)

    def test_logs_the_ordering_of_heads(self, new_run: Callable[..., Run]) -> None:
        run = new_run()
        run.weights()
        assert run.lines == ["ordering heads and neurons by importance"]


class TestFromScratch:
    """The paper's training: one stage, without a dense stage and without a teacher."""

    PAPER: dict[str, Any] = {
        "gating": "soft",
        "dense_epochs": 0,
        "distillation": 0.0,
        "temperature": (2.0, 0.5),
        "noise": 0.5,
    }
    FORM: dict[str, Any] = {
        "head_selection": "input",
        "budget_scope": "layer",
        "budget_ffn": False,
    }

    def test_learns_while_temperature_and_noise_fall(
        self, new_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        run, model = new_run(budget_epochs=4, **self.PAPER), new_network(**self.FORM)
        seen: list[Gating] = []
        monkeypatch.setattr(model, "set_gating", seen.append)
        before = mean_loss(run, model, 4)
        run.trainer(model).train()
        assert mean_loss(run, model, 4) < 0.9 * before
        assert {gating.mode for gating in seen} == {"soft"}
        assert seen[0] == Gating("soft", 2.0, 0.5)
        assert seen[-1].temperature == pytest.approx(0.5, abs=0.1)
        assert seen[-1].noise == pytest.approx(0, abs=0.04)
        assert run.lines == []

    def test_runs_no_teacher(self, new_run: Callable[..., Run]) -> None:
        run = new_run(budget_epochs=1, **self.PAPER)
        run.tokens.batches_left = 4  # the batches of its only epoch
        run.trainer(new_network(**self.FORM)).train()

    def test_resumes_after_a_power_cut(
        self, new_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(trainer_module, "SAVE_SECONDS", -1)
        resumed = new_run(**self.PAPER).weights(after=5, **self.FORM)
        assert_same_weights(resumed, new_run(**self.PAPER).weights(**self.FORM))

    def test_a_fixed_share_is_not_trained(self, new_run: Callable[..., Run]) -> None:
        run, model = new_run(**self.PAPER), new_network(**self.FORM)
        for layer in model.encoder.encoder_layers:
            assert layer.decision is not None
            layer.decision.controller.fix(0.6)
        run.trainer(model).train()
        output = model.eval()(**inputs(run.tokens.batch(np.arange(9))))
        torch.testing.assert_close(output.budget, torch.full((9, 2), 0.6))

    def test_random_heads_do_not_train_the_scorer(self, new_run: Callable[..., Run]) -> None:
        run = new_run(random_heads=True, weight_decay=0.0, **self.PAPER)
        model = new_network(**self.FORM)
        layer = model.encoder.encoder_layers[0]
        assert layer.decision is not None
        assert layer.decision.scorer is not None
        before = layer.decision.scorer.out.weight.detach().clone()
        run.trainer(model).train()
        assert torch.equal(layer.decision.scorer.out.weight, before)

    def test_dense_epochs_alone_train_the_full_network(self, new_run: Callable[..., Run]) -> None:
        run, model = new_run(dense_epochs=4, budget_epochs=0), new_network()
        before = mean_loss(run, model, 4)
        run.trainer(model).train()
        assert mean_loss(run, model, 4) < 0.7 * before


class TestDeterminism:
    def test_a_seed_gives_the_same_weights(self, new_run: Callable[..., Run]) -> None:
        first = new_run().weights()
        torch.manual_seed(77)
        np.random.default_rng(5).random()
        assert_same_weights(first, new_run().weights())

    def test_another_seed_gives_other_weights(self, new_run: Callable[..., Run]) -> None:
        first, second = new_run().weights(), new_run(seed=4).weights()
        assert not torch.equal(first["classifier.weight"], second["classifier.weight"])


@pytest.fixture(scope="module")
def uninterrupted(
    tmp_path_factory: pytest.TempPathFactory, _tokenizer_text: str
) -> dict[str, Tensor]:
    """Return the weights of a run without interruption."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    rows = topic_examples().subset(range(48))
    return Run(folder, Tokenizer.from_str(_tokenizer_text), rows).weights()


# 48 rows in batches of 12: 8 batches of dense training, 4 for the importance of heads, 1 for the
# teacher's answers (batches of 64), 8 of budget training; each case interrupts another phase.
CUTS = {
    "at once": 0,
    "in the first epoch": 2,
    "between epochs": 4,
    "in the second epoch": 7,
    "while ordering": 9,
    "before the teacher answers": 12,
    "before the first budget step": 13,
    "in the budget stage": 15,
    "between budget epochs": 17,
    "before the last step": 20,
}


class TestResuming:
    @pytest.fixture(autouse=True)
    def _save_every_step(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(trainer_module, "SAVE_SECONDS", -1)

    @pytest.mark.parametrize("after", CUTS.values(), ids=CUTS.keys())
    def test_ends_with_the_weights_of_an_uninterrupted_run(
        self, new_run: Callable[..., Run], uninterrupted: dict[str, Tensor], after: int
    ) -> None:
        run = new_run()
        if after == 0:
            # nothing was saved yet, so the next run starts again from the same network
            run.tokens.batches_left = 0
            with pytest.raises(PowerCutError):
                run.trainer(new_network()).train()
            run.tokens.batches_left = 10**9
            assert_same_weights(run.weights(), uninterrupted)
        else:
            assert_same_weights(run.weights(after=after), uninterrupted)

    def test_a_run_interrupted_every_few_batches_ends_with_the_same_weights(
        self, new_run: Callable[..., Run], uninterrupted: dict[str, Tensor]
    ) -> None:
        run = new_run()
        for _ in range(20):
            run.tokens.batches_left = 6
            model = new_network()
            try:
                run.trainer(model).train()
            except PowerCutError:
                continue
            break
        assert_same_weights(model.state_dict(), uninterrupted)

    @pytest.mark.parametrize("after", [6, 16])
    def test_soft_gates_resume_to_the_same_weights(
        self, new_run: Callable[..., Run], after: int
    ) -> None:
        recipe = {"gating": "soft", "noise": 0.5, "temperature": (2.0, 0.5)}
        selection = {"head_selection": "input"}
        resumed = new_run(**recipe).weights(after=after, **selection)
        assert_same_weights(resumed, new_run(**recipe).weights(**selection))

    @pytest.mark.parametrize("changes", [{"head_selection": "input"}, {"hidden_dropout_prob": 0.5}])
    def test_other_networks_resume_to_the_same_weights(
        self, new_run: Callable[..., Run], changes: dict[str, Any]
    ) -> None:
        assert_same_weights(new_run().weights(after=6, **changes), new_run().weights(**changes))

    def test_steps_after_the_last_save_are_repeated(
        self,
        new_run: Callable[..., Run],
        uninterrupted: dict[str, Tensor],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        run = new_run()
        run.tokens.batches_left = 5
        with pytest.raises(PowerCutError):
            run.trainer(new_network()).train()
        monkeypatch.setattr(trainer_module, "SAVE_SECONDS", 10**6)
        run.tokens.batches_left = 2
        with pytest.raises(PowerCutError):
            run.trainer(new_network(seed=9)).train()
        run.tokens.batches_left = 10**9
        assert_same_weights(run.weights(), uninterrupted)

    def test_logs_the_step_at_which_it_resumes(self, new_run: Callable[..., Run]) -> None:
        run = new_run()
        run.weights(after=6)
        assert run.lines[0].startswith("dense: resuming at step ")
        assert run.lines[0].endswith(" of 8")

    def test_a_finished_run_is_not_repeated(
        self, new_run: Callable[..., Run], uninterrupted: dict[str, Tensor]
    ) -> None:
        run = new_run()
        run.weights()
        run.tokens.batches_left = 0
        model = new_network(seed=50)
        run.trainer(model).train()
        assert_same_weights(model.state_dict(), uninterrupted)

    def test_leaves_one_readable_state_file(self, new_run: Callable[..., Run]) -> None:
        run = new_run()
        run.weights(after=6)
        assert [path.name for path in run.folder.iterdir()] == ["state.pt"]
        torch.load(run.folder / "state.pt", weights_only=True)

    def test_creates_its_folder(self, new_run: Callable[..., Run], tmp_path: Path) -> None:
        run = new_run(folder=tmp_path / "deep" / "down")
        run.weights()
        assert (tmp_path / "deep" / "down" / "state.pt").is_file()


class TestStep0:
    """The loss is that of the served answer: the encoder's logits plus step 0's share."""

    step0 = torch.randn(48, 3, generator=torch.Generator().manual_seed(0))

    def loss(self, run: Run, model: BudgetFormerForSequenceClassification) -> float:
        trainer = run.trainer(model.eval(), self.step0)
        return trainer._dense_loss(run.tokens.batch(np.arange(48)), None).item()

    @torch.no_grad()
    @pytest.mark.parametrize("share", [0.0, 0.5])
    def test_the_loss_includes_the_share_of_step_0(
        self, new_run: Callable[..., Run], share: float
    ) -> None:
        run, model = new_run(exit_share=share), new_network()
        encoder = run.trainer(model).predict(run.tokens, 4, "test")
        labels = torch.from_numpy(run.examples.labels)
        expected = model.loss(encoder + share * self.step0, labels)
        assert self.loss(run, model) == pytest.approx(expected.item(), rel=1e-4)

    @torch.no_grad()
    def test_texts_are_weighted_by_the_uncertainty_of_step_0(
        self, new_run: Callable[..., Run]
    ) -> None:
        run, model = new_run(exit_share=0.5, reach_weight=1.0), new_network()
        encoder = run.trainer(model).predict(run.tokens, 4, "test")
        labels = torch.from_numpy(run.examples.labels)
        losses = F.cross_entropy(encoder + 0.5 * self.step0, labels, reduction="none")
        uncertain = 1 - self.step0.softmax(-1).amax(-1)
        expected = (losses * uncertain / uncertain.mean()).mean()
        assert self.loss(run, model) == pytest.approx(expected.item(), rel=1e-4)

    def test_the_encoder_learns_nothing_from_texts_that_step_0_solves(
        self, new_run: Callable[..., Run]
    ) -> None:
        run = new_run(dense_epochs=1, budget_epochs=1, distillation=0.0, exit_share=1.0)
        known = 50.0 * F.one_hot(torch.from_numpy(run.examples.labels), 3).float()
        model = new_network(hidden_dropout_prob=0.0)
        before = mean_loss(run, model, 4)
        run.trainer(model, known).train()
        assert mean_loss(run, model, 4) == pytest.approx(before, rel=0.02)

    def test_the_teachers_answers_include_the_share_of_step_0(
        self, new_run: Callable[..., Run]
    ) -> None:
        run, model = new_run(exit_share=0.5, distillation=1.0), new_network().eval()
        trainer, batch = run.trainer(model, self.step0), run.tokens.batch(np.arange(48))
        with torch.no_grad():
            taught = trainer.predict(run.tokens, 4, "test") + 0.5 * self.step0
            loss = trainer._taught_loss(
                trainer._fused(trainer._logits(batch, 4), batch), batch, taught
            )
        assert loss.item() == pytest.approx(0, abs=1e-5)


class TestUpdates:
    @pytest.mark.parametrize(
        ("epochs", "updates", "expected"), [(2, 0, 8), (2, 8, 8), (2, 9, 12), (0, 9, 0)]
    )
    def test_few_texts_get_more_epochs(
        self, new_run: Callable[..., Run], epochs: int, updates: int, expected: int
    ) -> None:
        run = new_run(
            dense_epochs=0, budget_epochs=epochs, min_budget_updates=updates, distillation=0.0
        )
        run.trainer(new_network()).train()
        importance = 4  # batches that measure the importance of heads
        assert FailingTexts.batches_left - run.tokens.batches_left == importance + expected

    @pytest.mark.parametrize(("fast", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
    def test_auto_trains_in_bfloat16_where_that_is_faster(
        self,
        new_run: Callable[..., Run],
        monkeypatch: pytest.MonkeyPatch,
        fast: bool,
        dtype: torch.dtype,
    ) -> None:
        monkeypatch.setattr(trainer_module, "has_fast_bfloat16", lambda _: fast)
        linear, trainer = nn.Linear(2, 2), new_run(precision="auto").trainer(new_network())
        with trainer._autocast():
            assert linear(torch.ones(1, 2)).dtype == dtype


class TestMicroBatches:
    @pytest.mark.parametrize("micro_batch", [1, 5, 12, 100])
    def test_gradients_of_a_batch_add_up(
        self, new_run: Callable[..., Run], micro_batch: int
    ) -> None:
        """Without dropout, they equal those of the whole batch up to rounding."""
        results = []
        for size in (None, micro_batch):
            model = new_network(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).train()
            run = new_run()
            trainer = run.trainer(model, micro_batch=size)
            stage = trainer_module.Stage("budget", 1, trainer._budget_loss)
            loss = trainer._backward(stage, run.tokens.batch(np.arange(12)), seed=3)
            named = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
            results.append((loss, named))
        (whole_loss, whole), (split_loss, split) = results
        assert split_loss == pytest.approx(whole_loss, rel=1e-5)
        assert split.keys() == whole.keys()
        for name, gradient in whole.items():
            torch.testing.assert_close(split[name], gradient, rtol=1e-4, atol=1e-6)


class TestSandwich:
    def budget_steps(self, monkeypatch: pytest.MonkeyPatch, run: Run) -> list[tuple[int, int]]:
        """Train, and return (step, rows) of each pass of the budget stage."""
        seen: list[tuple[int, int]] = []
        run_at = SequenceClassifier.logits_at

        def record(model: Any, step: int, input_ids: Tensor, *rest: Any, **more: Any) -> Tensor:
            if model.training:
                seen.append((step, len(input_ids)))
            return run_at(model, step, input_ids, *rest, **more)

        monkeypatch.setattr(SequenceClassifier, "logits_at", record)
        run.trainer(new_network()).train()
        dense_batches = run.recipe.dense_epochs * 4
        return seen[dense_batches:]

    def test_every_update_has_the_smallest_and_the_full_step(
        self, new_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        seen = self.budget_steps(monkeypatch, new_run(budget_epochs=3))
        updates = [seen[i : i + 3] for i in range(0, len(seen), 3)]
        assert len(updates) == 3 * 4
        assert {(first, last) for (first, _), _, (last, _) in updates} == {(1, 4)}
        assert len({middle for _, (middle, _), _ in updates}) > 1
        assert all(len({rows for _, rows in update}) == 1 for update in updates)

    def test_without_sandwich_each_half_of_a_batch_has_a_random_step(
        self, new_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        run = new_run(budget_epochs=3, sandwich=False)
        seen = self.budget_steps(monkeypatch, run)
        assert {rows for _, rows in seen} == {6}
        assert len({step for step, _ in seen}) > 2


class TestPredict:
    def test_returns_logits_in_row_order(self, new_run: Callable[..., Run]) -> None:
        run, model = new_run(), new_network().eval()
        answers = run.trainer(model).predict(run.tokens, 2, "test")
        assert answers.shape == (48, 3)
        with torch.no_grad():
            for row in (0, 17, 47):
                alone = model(**inputs(run.tokens.batch(np.array([row]))), steps=2).logits
                torch.testing.assert_close(answers[row], alone[0], rtol=1e-4, atol=1e-5)

    def test_ignores_dropout(self, new_run: Callable[..., Run]) -> None:
        run, model = new_run(), new_network(hidden_dropout_prob=0.5).train()
        trainer = run.trainer(model)
        first, second = (trainer.predict(run.tokens, 4, "test") for _ in range(2))
        assert torch.equal(first, second)

    def test_accepts_other_texts(self, new_run: Callable[..., Run], tokenizer: Tokenizer) -> None:
        run = new_run()
        other = TokenizedTexts(tokenizer, ["The crew painted a tug."], None, 16)
        assert run.trainer(new_network()).predict(other, 1, "test").shape == (1, 3)


class TestSplit:
    @PROPERTY
    @given(st.integers(0, 200), st.floats(0, 1), st.integers(0, 100))
    def test_every_row_is_on_one_side(self, count: int, hold_out: float, seed: int) -> None:
        kept, held = split_rows(count, hold_out, seed)
        assert sorted([*kept.tolist(), *held.tolist()]) == list(range(count))
        assert len(held) == int(count * hold_out)
        assert kept.tolist() == sorted(kept.tolist())
        assert held.tolist() == sorted(held.tolist())

    def test_follows_the_seed(self) -> None:
        first, again, other = (split_rows(100, 0.2, seed)[1].tolist() for seed in (1, 1, 2))
        assert first == again
        assert first != other
