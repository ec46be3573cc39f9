"""The training loop, resumable and deterministic: first with all heads, then at all budgets."""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from torch import Tensor, nn

from budgetformer.checkpoint.staging import disk_errors
from budgetformer.errors import TrainingError, one_line
from budgetformer.inference.backends.linear import has_fast_bfloat16
from budgetformer.model.answers import confidence
from budgetformer.model.architecture import FIELDS, Architecture
from budgetformer.model.budget import Gating
from budgetformer.model.modeling import (
    BudgetFormerClassifierOutput,
    BudgetFormerForSequenceClassification,
)
from budgetformer.training.data import Examples, TokenBatch, TokenizedTexts
from budgetformer.training.importance import ladder_by_importance, order_by_importance
from budgetformer.training.objectives import (
    budget_penalty,
    distillation_loss,
    label_loss,
    random_steps,
    relevance_entropy,
)
from budgetformer.training.processes import SINGLE_PROCESS, Processes
from budgetformer.training.recipe import Recipe

SAVE_SECONDS = 120
IMPORTANCE_BATCHES = 32
STEPS_PER_BATCH = 2
CPU = torch.device("cpu")

Log = Callable[[str], None]


@dataclass(frozen=True)
class Stage:
    """Consecutive epochs with the same loss.

    Attributes:
        name: name of the stage, "dense" or "budget".
        epochs: number of epochs.
        loss: function from a batch and `teacher` to the loss.
        teacher: logits [N, C] to distil; None: learn from the labels only.
    """

    name: str
    epochs: int
    loss: Callable[[TokenBatch, Tensor | None], Tensor]
    teacher: Tensor | None = None


def progress_bar() -> Progress:
    """Return a progress bar, which is shown only on a terminal and in the first process."""
    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
        disable=not console.is_terminal or os.environ.get("RANK", "0") != "0",
    )


def rows_by_length(tokens: TokenizedTexts, size: int, title: str) -> Iterator[np.ndarray]:
    """Yield the rows of all texts, `size` at a time and short texts first, with a progress bar."""
    order = np.argsort(tokens.lengths, kind="stable")
    with progress_bar() as bar:
        task = bar.add_task(title, total=len(order), note="")
        for start in range(0, len(order), size):
            rows = order[start : start + size]
            yield rows
            bar.advance(task, len(rows))


def inputs(batch: TokenBatch) -> dict[str, Tensor]:
    """Return a batch's tensors as arguments of `forward`."""
    return {
        "input_ids": batch.input_ids,
        "attention_mask": batch.attention_mask,
        "token_type_ids": batch.token_type_ids,
    }


class Trainer:
    """Train one network on one data set.

    The state of a run is saved in `work_dir/state.pt`. If the file exists, the run resumes from it,
    and ends with exactly the weights of an uninterrupted run.

    Args:
        model: network to train.
        tokens, examples: texts of the data set and their tokens.
        recipe: settings of the run.
        work_dir: folder for the state.
        log: function that is called with one line per event.
        origin: identifier of the starting weights; empty: random weights.
        step0: step 0's out-of-fold logits of the texts [N, C]; None: no step 0.
        teacher: logits [N, C] to distil from the first epoch; None: the network is its own teacher
            after the dense epochs.
        device: device of the training; a run may resume on another device.
        micro_batch: items per pass, over which gradients are summed; None: the full batch.
        processes: training processes.

    Raises:
        TrainingError: in `train`, the state belongs to a run with another recipe, data or starting
            weights, or the loss is not a number.
    """

    def __init__(
        self,
        model: BudgetFormerForSequenceClassification,
        tokens: TokenizedTexts,
        examples: Examples,
        recipe: Recipe,
        work_dir: Path,
        log: Log,
        origin: str = "",
        step0: Tensor | None = None,
        teacher: Tensor | None = None,
        device: torch.device = CPU,
        micro_batch: int | None = None,
        processes: Processes = SINGLE_PROCESS,
    ) -> None:
        self.device, self.micro_batch, self.processes = device, micro_batch, processes
        self.teacher = self._on_device(teacher)
        self.step0 = self._on_device(None if step0 is None else recipe.exit_share * step0)
        weights = _reach_weights(step0, recipe.reach_weight, model.config.problem_type)
        self.weights = self._on_device(weights)
        self.model, self.tokens, self.recipe, self.log = model, tokens, recipe, log
        self._move(device)
        self.labels = torch.from_numpy(examples.labels).to(device)
        self.state_path = work_dir / "state.pt"
        with disk_errors(work_dir):
            work_dir.mkdir(parents=True, exist_ok=True)
        self.run = _run_digest(model.config, origin, tokens, examples, recipe)
        self.steps_per_epoch = -(-len(examples) // recipe.batch_size)

    def train(self, keep_dense: Callable[[], None] | None = None) -> None:
        """Run the stages of the recipe: dense epochs, ordering by importance, budget epochs.

        At the end, the network is on the CPU.

        Args:
            keep_dense: function that is called after the dense epochs, while the network is on the
                CPU.
        """
        resume = self._read_state()
        done = resume.get("done", [])
        if "dense" not in done:
            stage = Stage("dense", self.recipe.dense_epochs, self._dense_loss, self.teacher)
            self._run(stage, resume, done)
            if keep_dense is not None and self.processes.is_main:
                self._move(CPU)
                keep_dense()
                self._move(self.device)
            if self.model.config.head_selection == "ranked" or self.model.config.budget_ffn:
                self.log("ordering heads and neurons by importance")
                importance = order_by_importance(self.model, self.labelled_batches())
                if self.recipe.ladder == "importance":
                    self.model.config.ladder = ladder_by_importance(importance)
            done = [*done, "dense"]
            self._save_state({"done": done})
            resume = {}
        if "budget" not in done:
            teacher = self._on_device(resume.get("teacher", self.teacher))
            if teacher is None and self.recipe.distillation and self.recipe.budget_epochs:
                last = self.model.config.num_steps
                teacher = self.predict(self.tokens, last, "teacher").to(self.device)
                if self.step0 is not None:
                    teacher += self.step0
            stage = Stage("budget", self._budget_epochs(), self._budget_loss, teacher)
            frozen = self.recipe.freeze_embeddings and self.recipe.dense_epochs > 0
            embeddings = self.model.encoder.embeddings
            embeddings.requires_grad_(not frozen)
            self._run(stage, resume, done)
            embeddings.requires_grad_(True)
            self._save_state({"done": [*done, "budget"]})
        self.processes.wait()
        self._move(CPU)

    @torch.no_grad()
    def predict(self, tokens: TokenizedTexts, step: int, title: str) -> Tensor:
        """Return logits [N, C] of a data set at one ladder step, on the CPU."""
        self._move(self.device)
        self.model.eval()
        result = torch.zeros(len(tokens.ids), self.model.config.num_classes)
        for rows in rows_by_length(tokens, 64, title):
            result[rows] = self._logits(tokens.batch(rows).to(self.device), step).cpu()
        return result

    def labelled_batches(self) -> Iterator[dict[str, Tensor]]:
        """Yield arguments of `forward`, including labels, for the measurement of importance."""
        batches = self.tokens.batches(self.recipe.batch_size, self.recipe.seed)
        for batch in islice(batches, IMPORTANCE_BATCHES):
            yield inputs(batch.to(self.device)) | {"labels": self.labels[batch.rows]}

    def _budget_epochs(self) -> int:
        epochs = self.recipe.budget_epochs
        needed = -(-self.recipe.min_budget_updates // self.steps_per_epoch)
        return max(epochs, needed) if epochs else 0

    def _dense_loss(self, batch: TokenBatch, teacher: Tensor | None) -> Tensor:
        logits = self._fused(self._logits(batch, self.model.config.num_steps), batch)
        return self._taught_loss(logits, batch, teacher)

    def _budget_loss(self, batch: TokenBatch, teacher: Tensor | None) -> Tensor:
        recipe, config = self.recipe, self.model.config
        steps = None
        if recipe.gating == "hard":
            if self._sliceable:
                return self._sliced_loss(batch, teacher)
            steps = self._random_steps(len(batch.rows)).to(self.device)
        output = self._forward(batch, steps)
        assert output.logits is not None
        assert output.budget is not None
        loss = self._taught_loss(self._fused(output.logits, batch), batch, teacher)
        if output.relevance is not None:
            loss = loss + recipe.entropy_weight * relevance_entropy(output.relevance)
        low, high = config.budget_bounds
        return loss + recipe.budget_weight * budget_penalty(output.budget, (low, high))

    def _sliced_loss(self, batch: TokenBatch, teacher: Tensor | None) -> Tensor:
        """Return the loss of a batch at a few ladder steps, computing only the heads of each step.

        With `sandwich`, the full batch runs at the smallest, a random and the full step; otherwise
        each half of the batch runs at a random step.
        """
        if self.recipe.sandwich:
            last = self.model.config.num_steps
            steps = [1, *self._random_steps(1).tolist(), last] if last > 1 else [1]
            parts = [batch] * len(steps)
        else:
            parts = batch.split(STEPS_PER_BATCH)
            steps = self._random_steps(len(parts)).tolist()
        total, rows = torch.zeros((), device=self.device), sum(len(part.rows) for part in parts)
        for part, step in zip(parts, steps, strict=True):
            logits = self._fused(self._logits(part, step), part)
            loss = self._taught_loss(logits, part, teacher)
            total = total + loss * (len(part.rows) / rows)
        return total

    def _fused(self, logits: Tensor, batch: TokenBatch) -> Tensor:
        """Add step 0's weighted logits to the encoder's logits of a batch."""
        logits = logits.float()
        return logits if self.step0 is None else logits + self.step0[batch.rows]

    def _mean(self, losses: Tensor, batch: TokenBatch) -> Tensor:
        """Average the losses [B] of a batch, weighted by each text's chance to get past step 0."""
        return (losses if self.weights is None else losses * self.weights[batch.rows]).mean()

    def _random_steps(self, count: int) -> Tensor:
        recipe, last = self.recipe, self.model.config.num_steps
        return random_steps(count, last, recipe.small_step_bias, recipe.full_step_share)

    def _taught_loss(self, logits: Tensor, batch: TokenBatch, teacher: Tensor | None) -> Tensor:
        """Return the mean loss of a batch against its labels and, if given, the teacher."""
        recipe, kind = self.recipe, self.model.config.problem_type
        losses = label_loss(logits, self.labels[batch.rows], kind)
        if teacher is not None:
            distilled = distillation_loss(
                logits, teacher[batch.rows], recipe.distillation_temperature, kind
            )
            losses = torch.lerp(losses, distilled, recipe.distillation)
        return self._mean(losses, batch)

    def _logits(self, batch: TokenBatch, step: int) -> Tensor:
        """Return the encoder's logits at a ladder step, computing only its heads if possible."""
        with self._autocast():
            if self._sliceable:
                return self.model.logits_at(step, **inputs(batch)).float()
            output: BudgetFormerClassifierOutput = self.model(**inputs(batch), steps=step)
        assert output.logits is not None
        return output.logits.float()

    def _move(self, device: torch.device) -> None:
        nn.Module.to(self.model, device)

    def _on_device(self, values: Tensor | None) -> Tensor | None:
        return None if values is None else values.to(self.device)

    def _backward(self, stage: Stage, batch: TokenBatch, seed: int) -> float:
        """Accumulate the gradients of a batch over micro-batches, and return its loss."""
        total, rows = 0.0, len(batch.rows)
        local, factor = self.processes.local_batch(batch)
        for part in local.split(-(-len(local.rows) // (self.micro_batch or rows))):
            # Seeded per step, so that a resumed run draws the same noise as an uninterrupted one,
            # and all parts of a batch get the same random steps.
            torch.manual_seed(seed)
            share = factor * len(part.rows) / rows
            loss = stage.loss(part.to(self.device), stage.teacher) * share
            loss.backward()
            total += loss.item()
        return self.processes.sum_gradients(self.model, total)

    @property
    def _sliceable(self) -> bool:
        config = self.model.config
        return config.head_selection == "ranked" and config.budget_scope == "input"

    def _forward(
        self, batch: TokenBatch, steps: int | Tensor | None
    ) -> BudgetFormerClassifierOutput:
        with self._autocast():
            output: BudgetFormerClassifierOutput = self.model(**inputs(batch), steps=steps)
        return output

    def _gating(self, stage: Stage, progress: float) -> Gating:
        """Return the gating, annealed from exploration to exploitation (paper) with `progress`."""
        if stage.name == "dense":
            return Gating()  # all heads are used: nothing to explore
        first, last = self.recipe.temperature
        temperature = first + (last - first) * progress
        noise = self.recipe.noise * (1 - progress)
        return Gating(self.recipe.gating, temperature, noise, self.recipe.random_heads)

    def _autocast(self) -> Any:
        precision = self.recipe.precision
        if precision == "bf16" or (precision == "auto" and has_fast_bfloat16(self.device)):
            return torch.autocast(self.device.type, torch.bfloat16)
        return nullcontext()

    def _run(self, stage: Stage, resume: dict[str, Any], done: list[str]) -> None:
        self.processes.broadcast_weights(self.model)
        optimizer = self._optimizer()
        total = stage.epochs * self.steps_per_epoch
        warmup = max(1, int(total * self.recipe.warmup))
        start = 0
        if resume.get("stage") == stage.name:
            optimizer.load_state_dict(resume["optimizer"])
            start = resume["step"]
            self.log(f"{stage.name}: resuming at step {start} of {total}")
        saved = logged = time.monotonic()
        running = 0.0
        with progress_bar() as bar:
            task = bar.add_task(stage.name, total=total, completed=start, note="")
            for step, batch in self._schedule(start, total):
                self.model.train()
                self.model.set_gating(self._gating(stage, step / total))
                # Not `optimizer.zero_grad`: f_o and step 0, which it does not train, get gradients
                # too. These would accumulate, and count when gradients are clipped.
                self.model.zero_grad(set_to_none=True)
                value = self._backward(stage, batch, self.recipe.seed * 1_000_003 + step)
                if not math.isfinite(value):
                    raise TrainingError(
                        f"{stage.name}: the loss at step {step + 1} of {total} is not a number; "
                        "try a lower learning_rate"
                    )
                rate = min((step + 1) / warmup, (total - step) / max(1, total - warmup))
                for group in optimizer.param_groups:
                    group["lr"] = self.recipe.learning_rate * rate
                nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
                optimizer.step()
                running = 0.98 * running + 0.02 * value
                note = f"loss {running / (1 - 0.98 ** (step - start + 1)):.4f}"
                bar.update(task, completed=step + 1, note=note)
                now = time.monotonic()
                if now - logged > 60:
                    logged = now
                    self.log(f"{stage.name}: step {step + 1} of {total}, {note}")
                if now - saved > SAVE_SECONDS:
                    saved = now
                    self._save_state(
                        {
                            "done": done,
                            "stage": stage.name,
                            "step": step + 1,
                            "optimizer": optimizer.state_dict(),
                            "teacher": stage.teacher,
                        }
                    )

    def _schedule(self, start: int, total: int) -> Iterator[tuple[int, TokenBatch]]:
        for epoch in range(start // self.steps_per_epoch, -(-total // self.steps_per_epoch)):
            batches = self.tokens.batches(self.recipe.batch_size, self.recipe.seed + 1 + epoch)
            for step, batch in enumerate(batches, start=epoch * self.steps_per_epoch):
                if step >= start:
                    yield step, batch

    def _optimizer(self) -> torch.optim.Optimizer:
        trained = [
            (name, parameter)
            for name, parameter in self.model.named_parameters()
            if parameter.requires_grad
            and not name.startswith("exit_head")
            and (self.recipe.gating == "soft" or ".controller." not in name)
        ]
        groups = [
            {
                "params": [p for _, p in trained if p.ndim > 1],
                "weight_decay": self.recipe.weight_decay,
            },
            {"params": [p for _, p in trained if p.ndim <= 1], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=self.recipe.learning_rate, fused=True)

    def _save_state(self, state: dict[str, Any]) -> None:
        if not self.processes.is_main:
            return
        partial = self.state_path.with_suffix(".part")
        weights = {"model": self.model.state_dict(), "ladder": self.model.config.ladder}
        try:
            torch.save(state | weights | {"run": self.run}, partial)
            partial.replace(self.state_path)
        except (OSError, RuntimeError) as error:  # torch raises RuntimeError if the disk is full
            raise TrainingError(
                f"{self.state_path}: cannot be written: {one_line(error)}"
            ) from error

    def _read_state(self) -> dict[str, Any]:
        if not self.state_path.exists():
            return {}
        try:
            state: dict[str, Any] = torch.load(
                self.state_path, map_location="cpu", weights_only=True
            )
        except Exception as error:  # torch raises many types
            raise TrainingError(f"{self.state_path}: damaged; remove it to start anew") from error
        if state.pop("run", None) != self.run:
            raise TrainingError(
                f"{self.state_path}: belongs to a run with another recipe, data or encoder; "
                "remove it to start anew, or choose another --work-dir"
            )
        self.model.load_state_dict(state.pop("model"))
        self.model.config.ladder = state.pop("ladder")
        return state


def _reach_weights(step0: Tensor | None, share: float, problem_type: str | None) -> Tensor | None:
    """Return a loss weight per text [N], by its chance to get past step 0; None: equal weights."""
    if step0 is None or not share:
        return None
    uncertain = 1 - confidence(step0, problem_type)
    return (1 - share) + share * uncertain / uncertain.mean().clamp(min=1e-9)


def _run_digest(
    config: Architecture,
    origin: str,
    tokens: TokenizedTexts,
    examples: Examples,
    recipe: Recipe,
) -> str:
    """Return a SHA-256 of everything that determines a run's weights."""
    settings = [
        {name: getattr(config, name) for name in FIELDS},
        origin,
        recipe.as_dict(),
        examples.names,
    ]
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for row in (examples.labels, tokens.lengths, *tokens.ids, *tokens.types):
        digest.update(np.ascontiguousarray(row).data)
    return digest.hexdigest()


def split_rows(count: int, hold_out: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Split row numbers 0..count-1 at random into (training, held out), each rising."""
    order = np.random.default_rng(seed).permutation(count)
    kept = count - int(count * hold_out)
    return np.sort(order[:kept]), np.sort(order[kept:])
