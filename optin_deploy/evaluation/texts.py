"""Accuracy and rank correlation on tables of texts and of pairs of texts."""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from optin_deploy.data.preprocessing import Text, TextPreprocessing
from optin_deploy.data.tables import TextTable, read_table
from optin_deploy.data.texts import (
    as_texts,
    check_texts,
    classes_of_labels,
    split_batches,
    text_length,
    warn_truncated,
)
from optin_deploy.errors import UserError
from optin_deploy.evaluation.dataset import Dataset, compute_logits, to_device_of
from optin_deploy.evaluation.metrics import spearman
from optin_deploy.network import Network
from optin_deploy.nn.batches import Batch
from optin_deploy.nn.outputs import named_outputs
from optin_deploy.nn.sentence_embeddings import EMBEDDING, FEATURES, Sentences, similarity, tell_default
from optin_deploy.nn.task_head import answers, is_single
from optin_deploy.utils.progress import track

_BATCH_SIZE = 64
# Tokens of a batch, padding included: 64 texts of 128 tokens. Longer texts come in smaller batches.
_MOST_TOKENS = 8192
# Tokenizers' name of the mask, for modules of the user's own.
MASK_NAME = "attention_mask"
_TRUTH = {"0": False, "1": True, "0.0": False, "1.0": True, "false": False, "true": True}
_SPEARMAN = "Spearman × 100"


@dataclass(frozen=True)
class _Table:
    """The rows of a table: one or two columns of texts, then the label."""

    path: Path
    rows: list[list[str]]
    columns: list[tuple[str, ...]]
    class_names: tuple[str, ...] | None

    @property
    def labels(self) -> list[str]:
        return [row[-1].strip() for row in self.rows]


def load_texts(network: Network, preprocessing: TextPreprocessing, path: Path, columns: str | None = None) -> Dataset:
    """Return a table of texts as a data set; its columns and the network's head decide the metric.

    - "text,label": accuracy of a classifier.
    - "first,second,label" or "first+second,label": accuracy of a classifier of pairs, which are one input.
    - The same with a head of one number: Spearman's correlation with numeric labels, or accuracy of the sign for labels
      0 and 1 of a yes/no head.
    - "first,second,score" without a class head: Spearman's correlation of the score with the similarity of the two
      sentence embeddings. Embeddings and similarity are the model's own (see `Sentences`).

    Raises:
        UserError: the table is unreadable, empty, or does not suit the network.
    """
    table = _read_columns(path, columns)
    if network.logits is not None:
        return _load_labelled(network, preprocessing, table)
    if len(table.rows[0]) == 3:
        return _load_similarities(network, preprocessing, table)
    raise UserError("the network has no class logits: accuracy cannot be measured (sentence pairs need three columns)")


def _read_columns(path: Path, columns: str | None) -> _Table:
    table = read_table(path)
    names = table.header or [str(i + 1) for i in range(table.width)]
    groups = _join_pairs(table.split(columns) if columns else [(name,) for name in names], table)
    selected = [name for group in groups for name in group]
    rows = table.select(selected)
    if columns is None:
        _check_texts_are_no_numbers(path, rows)
    return _Table(path, rows, groups, table.names_of_classes(selected[-1]))


def _check_texts_are_no_numbers(path: Path, rows: Sequence[Sequence[str]]) -> None:
    """Raise UserError if a column of texts holds only numbers: it may be an index."""
    for column in range(len(rows[0]) - 1):
        if all(row[column].strip().isdecimal() for row in rows):
            raise UserError(
                f"{path}: column {column + 1} holds numbers only, where texts are expected; name the columns with "
                "--evaluate-columns, as in text,label or first,second,label"
            )


def _join_pairs(groups: list[tuple[str, ...]], table: TextTable) -> list[tuple[str, ...]]:
    """Return the columns of the input, one or two, and the column of the label; UserError for other columns."""
    sizes = [len(group) for group in groups]
    if sizes == [1, 1, 1]:
        return [(*groups[0], *groups[1]), groups[2]]
    if sizes in ([1, 1], [2, 1]):
        return groups
    count = "+".join(map(str, sizes)) if max(sizes) > 1 else len(groups)
    raise UserError(
        f"{table.path}: {count} columns; name two (text,label) or three (first,second,score) with --evaluate-columns"
        + table.separator_hint()
    )


def _load_labelled(network: Network, preprocessing: TextPreprocessing, table: _Table) -> Dataset:
    texts = as_texts(table.rows, table.columns[0])
    check_texts(texts, preprocessing, table.path)
    warn_truncated(texts, preprocessing, str(table.path))
    labels = _parse_labels(network, table)
    order = sorted(range(len(texts)), key=lambda i: text_length(texts[i]))
    ordered, is_score = [texts[i] for i in order], labels.is_floating_point()

    def measure(module: nn.Module) -> float:
        logits = torch.cat([compute_logits(network, module, batch) for batch in _batches(ordered, preprocessing)])
        if is_score:
            return 100 * spearman(logits.reshape(-1).double(), labels[order])
        correct = answers(network.head, logits).reshape(-1) == labels[order]
        return 100 * int(correct.sum()) / len(texts)

    metric = _SPEARMAN if is_score else "accuracy"
    return Dataset(metric, str(table.path), len(texts), measure, pairs=isinstance(texts[0], tuple))


def _parse_labels(network: Network, table: _Table) -> Tensor:
    """Return scores (float), yes or no (bool) or class numbers (int), as the network's head needs them."""
    with torch.no_grad():
        logits = network.forward(network.inputs)[network.logits or ""]
    if logits.dim() > 2:
        raise UserError(
            f"{network.source.name} returns logits of shape {tuple(logits.shape)}, several for each text: one label "
            "per text is not enough"
        )
    kind, labels = network.head, table.labels
    if kind != "classes" and not is_single(logits):
        raise UserError(
            f"{network.source.name} returns {logits.shape[1]} answers for each text: one label per text is not enough"
        )
    if kind == "regression" or (kind == "binary" and _are_scores(labels)):
        return _parse_scores(table)
    if kind == "binary" and all(label.lower() in _TRUTH for label in labels):
        return torch.tensor([_TRUTH[label.lower()] for label in labels])
    return torch.tensor(classes_of_labels(network, labels, table.path, table.class_names))


def _are_scores(labels: Sequence[str]) -> bool:
    """Whether labels are numbers, and not only 0 and 1."""
    try:
        return not {float(label) for label in labels} <= {0.0, 1.0}
    except ValueError:
        return False


def _parse_scores(table: _Table) -> Tensor:
    try:
        scores = torch.tensor([float(label) for label in table.labels], dtype=torch.float64)
    except ValueError as error:
        raise UserError(f"{table.path}: the last column must be a number: {error}") from error
    if not scores.isfinite().all() or len(scores.unique()) < 2:
        raise UserError(f"{table.path}: a correlation needs finite scores, and at least two different ones")
    return scores


def _load_similarities(network: Network, preprocessing: TextPreprocessing, table: _Table) -> Dataset:
    scores = _parse_scores(table)
    if FEATURES not in network.outputs and not network.pools:
        raise UserError(f"sentence pairs need a network that returns token features ({FEATURES})")
    sentences = network.sentences or Sentences()
    if sentences.is_default:
        tell_default(network.source.name)
    texts = sorted({text for row in table.rows for text in row[:2]}, key=lambda text: (len(text), text))
    check_texts(texts, preprocessing, table.path)
    warn_truncated(texts, preprocessing, str(table.path))
    index = {text: i for i, text in enumerate(texts)}
    head = copy.deepcopy(sentences.head).double()

    @torch.no_grad()
    def embed(module: nn.Module, batch: Batch) -> Tensor:
        outputs = named_outputs(module(**to_device_of(module, batch)))
        # A module that pools by itself, as an exported file may, returns embeddings.
        if EMBEDDING not in outputs:
            mask = batch.get(network.token_mask or MASK_NAME)
            outputs[EMBEDDING] = head(outputs[FEATURES].double().cpu(), mask)
        return outputs[EMBEDDING].double().cpu()

    def measure(module: nn.Module) -> float:
        embeddings = torch.cat([embed(module, batch) for batch in _batches(texts, preprocessing)])
        first, second = (embeddings[[index[row[i]] for row in table.rows]] for i in (0, 1))
        return 100 * spearman(similarity(sentences.similarity, first, second), scores)

    return Dataset(_SPEARMAN, str(table.path), len(table.rows), measure)


def _batches(texts: Sequence[Text], preprocessing: TextPreprocessing) -> Iterator[Batch]:
    for start in track(range(0, len(texts), _BATCH_SIZE)):
        for _, batch in split_batches(texts[start : start + _BATCH_SIZE], preprocessing, _MOST_TOKENS):
            yield batch
