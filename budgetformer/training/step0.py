"""Fit step 0: a linear support vector machine on TF-IDF features, with calibrated confidence."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import numpy as np
import scipy.sparse as sp
import torch
import torch.nn.functional as F
from scipy.optimize import minimize_scalar
from sklearn.svm import LinearSVC
from torch import Tensor

from budgetformer.model import tfidf as step0
from budgetformer.model.architecture import MULTI_LABEL, Architecture
from budgetformer.model.step0 import TfidfHead
from budgetformer.training.data import Examples, TokenizedTexts
from budgetformer.training.exits import wrong
from budgetformer.training.recipe import Recipe
from budgetformer.training.trainer import progress_bar

CHOICE_ROWS = 20_000
"""Maximum rows on which the hyperparameters are chosen; more make no difference."""
REGULARISATION = (0.25, 0.5, 1.0, 2.0)
"""Values of C that are tried."""
REPEATS = (0.0, 1.0)
"""Values of r that are tried: the frequency of a feature is 1 + r * log(count)."""


@dataclass(frozen=True)
class LinearModel:
    """A fitted linear model: `coefficients` [K, rows] and `intercept` [K]."""

    coefficients: np.ndarray
    intercept: np.ndarray

    def scores(self, matrix: sp.csr_matrix) -> np.ndarray:
        """Return the scores [N, K] of features [N, rows]."""
        scores: np.ndarray = matrix @ self.coefficients.T + self.intercept
        return scores


def fit_step0(
    config: Architecture, tokens: TokenizedTexts, examples: Examples, recipe: Recipe
) -> tuple[TfidfHead, Tensor]:
    """Fit step 0 on N texts, and return it with its out-of-fold logits [N, C].

    Out-of-fold logits come from models that never saw the text, so they are as accurate and as
    confident as on new texts. The encoder is trained with them.
    """
    count, labels = len(examples), torch.from_numpy(examples.labels)
    folds = np.random.default_rng(recipe.seed).permutation(count) % recipe.exit_folds
    features = step0.features(
        np.concatenate(tokens.full_ids),
        np.concatenate(tokens.full_types),
        [len(ids) for ids in tokens.full_ids],
        config.vocab_size,
        config.exit_buckets,
    )
    size = config.vocab_size + config.exit_buckets
    frequency = np.bincount(features.row, minlength=size)
    idf = (np.log((1 + count) / (1 + frequency)) + 1) / step0.IDF_UNIT
    idf = idf.round().clip(1, 255).astype(np.uint8)
    shape = (count, size)
    targets = _targets(examples, config)
    sample = np.sort(np.random.default_rng(recipe.seed).permutation(count)[:CHOICE_ROWS])
    with progress_bar() as bar:
        combinations = list(product(REPEATS, REGULARISATION))
        total = len(combinations) + recipe.exit_folds + 1
        task = bar.add_task("step 0", total=total, note="")

        def matrix_of(repeats: float) -> sp.csr_matrix:
            values = step0.tfidf(features, idf, repeats).astype(np.float64)
            return sp.csr_matrix((values, (features.owner, features.row)), shape=shape)

        matrices = {repeats: matrix_of(repeats) for repeats in REPEATS}
        best, fewest = combinations[0], np.inf
        rows, held_out = sample[folds[sample] != 0], sample[folds[sample] == 0]
        for repeats, c in combinations:
            if len(held_out) and len(rows):
                model = _fit(matrices[repeats][rows], targets[rows], c, recipe.seed)
                logits = _logits(model.scores(matrices[repeats][held_out]), config)
                errors = float(wrong(logits, labels[held_out], config.problem_type).sum())
                if errors < fewest:
                    best, fewest = (repeats, c), errors
            bar.advance(task)
        repeats, c = best
        matrix = matrices[repeats]
        scores = np.zeros((count, targets.shape[1]))
        for fold in range(recipe.exit_folds):
            unseen = folds == fold
            if unseen.any() and not unseen.all():
                model = _fit(matrix[~unseen], targets[~unseen], c, recipe.seed)
                scores[unseen] = model.scores(matrix[unseen])
            bar.advance(task)
        model = _fit(matrix, targets, c, recipe.seed)
        bar.advance(task)
    logits = _logits(scores, config)
    scale = _fit_scale(logits, labels, config)
    head = TfidfHead(config)
    coefficients, intercept = (
        torch.from_numpy(fitted * scale) for fitted in (model.coefficients, model.intercept)
    )
    head.fill(coefficients, intercept, torch.from_numpy(idf), repeats)
    return head, (logits * scale).float()


def _targets(examples: Examples, config: Architecture) -> np.ndarray:
    """Return the 0/1 targets [N, K] of the K columns of step 0's table (one for two classes)."""
    if examples.multi_label:
        return examples.labels
    first = 1 if config.num_classes == 2 else 0
    classes = np.arange(first, config.num_classes)
    return (examples.labels[:, None] == classes).astype(np.int8)  # type: ignore[no-any-return]


def _fit(matrix: sp.csr_matrix, targets: np.ndarray, c: float, seed: int) -> LinearModel:
    """Fit one model per target; a target with a single value is predicted as that value."""
    coefficients = np.zeros((targets.shape[1], matrix.shape[1]))
    intercept = np.zeros(targets.shape[1])
    for column, target in enumerate(targets.T):
        if target.min() == target.max():
            intercept[column] = 1.0 if target[0] else -1.0
            continue
        fitted = LinearSVC(C=c, random_state=seed).fit(matrix, target)
        coefficients[column], intercept[column] = fitted.coef_[0], fitted.intercept_[0]
    return LinearModel(coefficients, intercept)


def _logits(scores: np.ndarray, config: Architecture) -> Tensor:
    """Turn scores [N, K] into logits [N, C], as `TfidfHead` does."""
    logits = torch.from_numpy(scores)
    return torch.cat([-logits, logits], -1) if logits.shape[1] < config.num_classes else logits


def _fit_scale(logits: Tensor, labels: Tensor, config: Architecture) -> float:
    """Return the factor that calibrates the confidence of out-of-fold logits [N, C].

    Label smoothing, by the weight of one text, avoids an infinite factor if all texts are correct.
    """
    smoothing = 1 / (len(labels) + 1)

    def loss(log_scale: float) -> float:
        scaled = logits * float(np.exp(log_scale))
        if config.problem_type == MULTI_LABEL:
            target = labels.double() * (1 - smoothing) + smoothing / 2
            return float(F.binary_cross_entropy_with_logits(scaled, target))
        return float(F.cross_entropy(scaled, labels, label_smoothing=smoothing))

    return float(np.exp(minimize_scalar(loss, bounds=(-3.0, 4.0), method="bounded").x))
