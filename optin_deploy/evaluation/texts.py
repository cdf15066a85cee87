"""Accuracy and rank correlation on tables of texts and of pairs of texts, dense and pruned alike."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from optin_deploy.data.preprocessing import Text, TextPreprocessing
from optin_deploy.data.tables import Table, read_table
from optin_deploy.data.texts import as_texts, check_texts, class_numbers_of, length, tell_cut
from optin_deploy.errors import UserError
from optin_deploy.evaluation.dataset import Dataset
from optin_deploy.network import Network
from optin_deploy.nn.outputs import named_outputs
from optin_deploy.nn.sentence_embeddings import EMBEDDING, FEATURES, Sentences, similarity, tell_default
from optin_deploy.nn.task_head import answers, is_single
from optin_deploy.utils.progress import track

_BATCH_SIZE = 64
# Tokens of a batch, padding included: as many as 64 texts of 128 have. Longer texts come in smaller batches.
_MOST_TOKENS = 8192
# What tokenizers call the mask, for modules of the user's own.
MASK_NAME = "attention_mask"
_TRUTH = {"0": False, "1": True, "0.0": False, "1.0": True, "false": False, "true": True}


def load_texts(network: Network, preprocessing: TextPreprocessing, path: Path, columns: str | None = None) -> Dataset:
    """What a table of texts measures of ``network``.

    "text,label" is the accuracy of a classifier on texts; "first,second,label", or "first+second,label", that of a
    classifier of pairs, which takes both as one input. For a head of one number, labels that are numbers give
    Spearman's correlation with it, and labels 0 and 1 the accuracy of its sign where it answers yes or no.
    "first,second,score" of a network without such a head is Spearman's correlation of the similarity of the two
    sentences' embeddings with the score. Embeddings and similarity are the model's own (see `sentences`).

    Raises:
        UserError: the table is unreadable, empty, or does not suit the network.
    """
    table = read_table(path)
    own = table.header or [str(i + 1) for i in range(table.width)]
    groups = _grouped(table.split(columns) if columns else [(name,) for name in own], table)
    names = [name for group in groups for name in group]
    rows = table.select(names)
    if columns is None:
        _check_texts_are_no_numbers(path, rows)
    if len(names) == 3 and network.logits is None:
        return _similarities(network, preprocessing, path, rows)
    if network.logits is None:
        raise UserError(
            "the network has no class logits: accuracy cannot be measured (sentence pairs need three columns)"
        )
    texts = as_texts(rows, groups[0])
    check_texts(texts, preprocessing, path)
    tell_cut(texts, preprocessing, str(path))
    labels = [row[-1].strip() for row in rows]
    return _answers(network, preprocessing, path, (texts, labels), table.names_of_classes(names[-1]))


def _check_texts_are_no_numbers(path: Path, rows: Sequence[Sequence[str]]) -> None:
    """Raise UserError where a column that is taken for texts holds numbers alone: numbers of rows, perhaps."""
    for column in range(len(rows[0]) - 1):
        if all(row[column].strip().isdecimal() for row in rows):
            raise UserError(
                f"{path}: column {column + 1} holds numbers only, where texts are expected; name the columns with "
                "--evaluate-columns, as in text,label or first,second,label"
            )


def _grouped(groups: list[tuple[str, ...]], table: Table) -> list[tuple[str, ...]]:
    """The columns of an input, one or two, and the column of its label; UserError for others."""
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


def _answers(
    network: Network,
    preprocessing: TextPreprocessing,
    path: Path,
    samples: tuple[list[Text], list[str]],
    class_names: tuple[str, ...] | None,
) -> Dataset:
    """What a head says of texts against their labels."""
    texts, labels = samples
    with torch.no_grad():
        logits = network.forward(network.inputs)[network.logits or ""]
    kind = network.head
    if logits.dim() > 2:
        raise UserError(
            f"{network.source.name} gives logits of shape {tuple(logits.shape)}, several for each text: one label a "
            "text says nothing of them"
        )
    if kind != "classes" and not is_single(logits):
        raise UserError(
            f"{network.source.name} gives {logits.shape[1]} answers for each text: one label a text says nothing of "
            "them"
        )
    if kind == "regression" or (kind == "binary" and _are_scores(labels)):
        wanted = _scores(path, labels)
    elif kind == "binary" and all(label.lower() in _TRUTH for label in labels):
        wanted = torch.tensor([_TRUTH[label.lower()] for label in labels])
    else:
        wanted = torch.tensor(class_numbers_of(network, labels, path, class_names))
    order = sorted(range(len(texts)), key=lambda i: length(texts[i]))
    ranked = wanted.is_floating_point()

    def measure(module: nn.Module) -> float:
        found = []
        for batch in _batches([texts[i] for i in order], preprocessing):
            found.append(_run(network, module, batch)[network.logits or ""].cpu())
        given = torch.cat(found)
        if ranked:
            return 100 * spearman(given.reshape(-1).double(), wanted[order])
        right = answers(kind, given).reshape(-1) == wanted[order]
        return 100 * int(right.sum()) / len(texts)

    metric, pairs = "Spearman × 100" if ranked else "accuracy", isinstance(texts[0], tuple)
    return Dataset(metric, str(path), len(texts), measure, pairs)


def _are_scores(labels: Sequence[str]) -> bool:
    """Whether labels are numbers other than those of no and yes."""
    try:
        return not {float(label) for label in labels} <= {0.0, 1.0}
    except ValueError:
        return False


def _scores(path: Path, labels: Sequence[str]) -> Tensor:
    try:
        scores = torch.tensor([float(label) for label in labels], dtype=torch.float64)
    except ValueError as error:
        raise UserError(f"{path}: the last column must be a number: {error}") from error
    if not scores.isfinite().all() or len(scores.unique()) < 2:
        raise UserError(f"{path}: a correlation needs finite scores, and at least two different ones")
    return scores


def _similarities(network: Network, preprocessing: TextPreprocessing, path: Path, rows: list[list[str]]) -> Dataset:
    scores = _scores(path, [row[2] for row in rows])
    if FEATURES not in network.outputs and not network.pools:
        raise UserError(f"sentence pairs need a network that gives token features ({FEATURES})")
    sentences = network.sentences or Sentences()
    if sentences.is_default:
        tell_default(network.source.name)
    texts = sorted({text for row in rows for text in row[:2]}, key=lambda text: (len(text), text))
    check_texts(texts, preprocessing, path)
    tell_cut(texts, preprocessing, str(path))
    place = {text: i for i, text in enumerate(texts)}
    head = copy.deepcopy(sentences.head).double()

    def measure(module: nn.Module) -> float:
        parts = []
        for batch in _batches(texts, preprocessing):
            outputs = _raw(module, batch)
            # A module that pools by itself, as an exported file may, gives embeddings already.
            if EMBEDDING not in outputs:
                mask = batch.get(network.token_mask or MASK_NAME)
                outputs[EMBEDDING] = head(outputs[FEATURES].double().cpu(), mask)
            parts.append(outputs[EMBEDDING].double().cpu())
        embeddings = torch.cat(parts)
        first, second = (embeddings[[place[row[i]] for row in rows]] for i in (0, 1))
        return 100 * spearman(similarity(sentences.similarity, first, second), scores)

    return Dataset("Spearman × 100", str(path), len(rows), measure)


def _batches(texts: Sequence[Text], preprocessing: TextPreprocessing) -> Iterator[dict[str, Tensor]]:
    for start in track(range(0, len(texts), _BATCH_SIZE)):
        yield from _bounded(texts[start : start + _BATCH_SIZE], preprocessing)


def _bounded(texts: Sequence[Text], preprocessing: TextPreprocessing) -> Iterator[dict[str, Tensor]]:
    """The batch of ``texts``, or several where long texts would make it large."""
    batch = preprocessing(texts)
    if len(texts) == 1 or max(t.shape[:2].numel() for t in batch.values()) <= _MOST_TOKENS:
        yield batch
        return
    middle = len(texts) // 2
    yield from _bounded(texts[:middle], preprocessing)
    yield from _bounded(texts[middle:], preprocessing)


@torch.no_grad()
def _raw(module: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    return named_outputs(module(**{name: t.to(device) for name, t in batch.items()}))


@torch.no_grad()
def _run(network: Network, module: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    return network.forward({name: t.to(device) for name, t in batch.items()}, module)


def spearman(a: Tensor, b: Tensor) -> float:
    """Spearman's rank correlation of two vectors; equal values share their mean rank."""
    return float(torch.corrcoef(torch.stack([_ranks(a), _ranks(b)]))[0, 1])


def _ranks(values: Tensor) -> Tensor:
    _, inverse, counts = torch.unique(values, return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts.double() - 1) / 2)[inverse]
