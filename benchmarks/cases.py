"""The real networks that accuracy is measured on: calibration data, labels for what needs them, and figures."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import common
import resnet_cifar10
import saliency
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from optin_deploy import Network, load_network
from optin_deploy.data.calibration import load_calibration
from optin_deploy.data.image_files import image_files, read_images
from optin_deploy.data.tables import read_table
from optin_deploy.evaluation.texts import spearman

Batch = dict[str, Tensor]
# Photographs that no seed calibrates on.
_JUDGED_PHOTOS = 64
_CIFAR_CALIBRATION = 2_048
_BATCH = 64


@dataclass(frozen=True)
class Case:
    """One network with calibration data drawn for one seed.

    ``labels`` are class numbers for each batch, where the network has class logits. ``measure`` gives figures by name
    for a module in the network's place; the first one is the headline.
    """

    name: str
    network: Network
    batches: Sequence[Batch]
    labels: Sequence[Tensor] | None
    measure: Callable[[nn.Module], dict[str, float]]


def stsb(data: Path, seed: int, samples: int | None = None) -> Case:
    """all-MiniLM-L6-v2 on STS-B dev, calibrated on unlabelled STS-B train sentences."""
    network = load_network(common.minilm_directory())
    calibration = load_calibration(network, data / "stsb" / "train.csv", column="1,2", samples=samples, seed=seed)
    rows = read_table(data / "stsb" / "dev.csv").rows
    gold = torch.tensor([float(row[2]) for row in rows], dtype=torch.float64)
    texts = sorted({text for row in rows for text in row[:2]}, key=lambda text: (len(text), text))
    place = {text: i for i, text in enumerate(texts)}
    pairs = [[place[row[i]] for row in rows] for i in (0, 1)]
    prepared = _prepared(network, texts)

    def embeddings(module: nn.Module) -> Tensor:
        parts = []
        for batch in prepared:
            features = network.forward(batch, module)["last_hidden_state"].double()
            weights = batch["attention_mask"].double()
            parts.append(F.normalize((features * weights[..., None]).sum(1) / weights.sum(1, keepdim=True), dim=-1))
        return torch.cat(parts)

    @torch.inference_mode()
    def measure(module: nn.Module) -> dict[str, float]:
        own = embeddings(module)
        similarity = (own[pairs[0]] * own[pairs[1]]).sum(1)
        return {
            "Spearman × 100": 100 * spearman(similarity, gold),
            "cosine to dense": float((own * dense).sum(1).mean()),
            "similarity correlation": _correlation(similarity, dense_similarity),
        }

    with torch.inference_mode():
        dense = embeddings(network.module)
        dense_similarity = (dense[pairs[0]] * dense[pairs[1]]).sum(1)
    return Case("stsb", network, calibration.batches, None, measure)


def sst2(data: Path, seed: int, samples: int | None = None) -> Case:
    """MiniLM fine-tuned on SST-2: accuracy on dev; agreement with the dense network on train sentences not used."""
    network = load_network(str(data / "minilm_sst2"))
    train = data / "sst2" / "train.tsv"
    calibration = load_calibration(network, train, column="1", labels="2", samples=samples, seed=seed)
    used = {tuple(row[row != 0].tolist()) for batch in calibration.batches for row in batch["input_ids"]}
    texts = sorted({row[0].strip() for row in read_table(train).rows}, key=lambda text: (len(text), text))
    prepared = []
    for batch in _prepared(network, texts):
        fresh = torch.tensor([tuple(row[row != 0].tolist()) not in used for row in batch["input_ids"]])
        prepared.append({name: t[fresh] for name, t in batch.items()})
    dev = sorted(read_table(data / "sst2" / "dev.tsv").rows, key=lambda row: len(row[0]))
    dev_batches, dev_labels = _prepared(network, [row[0] for row in dev]), torch.tensor([int(row[1]) for row in dev])

    def logits(module: nn.Module, batches: Sequence[Batch]) -> Tensor:
        return torch.cat([network.forward(batch, module)["logits"].double() for batch in batches])

    @torch.inference_mode()
    def measure(module: nn.Module) -> dict[str, float]:
        accuracy = (logits(module, dev_batches).argmax(1) == dev_labels).double().mean()
        return {"accuracy": 100 * float(accuracy), **_agreement(logits(module, prepared), dense)}

    with torch.inference_mode():
        dense = logits(network.module, prepared)
    return Case("sst2", network, calibration.batches, calibration.labels, measure)


def _resnet(depth: int, data: Path, seed: int, samples: int | None) -> Case:
    """A CIFAR ResNet on the 5,000 test images, calibrated on train images."""
    network = resnet_cifar10.cifar_network(data, depth)
    images, labels = resnet_cifar10.cifar_images(data, "train")
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    used = order[: samples or _CIFAR_CALIBRATION].numpy()
    test_images, test_labels = resnet_cifar10.cifar_images(data, "test")
    test = [batch["image"] for batch in resnet_cifar10.batches(test_images, 250)]

    @torch.inference_mode()
    def measure(module: nn.Module) -> dict[str, float]:
        logits = torch.cat([module(image).double() for image in test])
        accuracy = (logits.argmax(1) == torch.from_numpy(test_labels)).double().mean()
        return {"accuracy": 100 * float(accuracy), **_agreement(logits, dense)}

    with torch.inference_mode():
        dense = torch.cat([network.module(image).double() for image in test])
    classes = torch.from_numpy(labels[used]).split(_BATCH)
    return Case(f"resnet{depth}", network, list(resnet_cifar10.batches(images[used], _BATCH)), classes, measure)


def resnet20(data: Path, seed: int, samples: int | None = None) -> Case:
    """See `_resnet`."""
    return _resnet(20, data, seed, samples)


def resnet56(data: Path, seed: int, samples: int | None = None) -> Case:
    """See `_resnet`."""
    return _resnet(56, data, seed, samples)


def saliency_maps(data: Path, seed: int, samples: int | None = None) -> Case:
    """ViT-S/14 with a saliency decoder, judged by its own dense maps on photographs that no seed calibrates on."""
    network = saliency.saliency_network(data)
    files = image_files(data / "photos")
    order = torch.randperm(len(files), generator=torch.Generator().manual_seed(12345)).tolist()
    judged = _pictures(network, [files[i] for i in order[:_JUDGED_PHOTOS]])
    rest = order[_JUDGED_PHOTOS:]
    drawn = torch.randperm(len(rest), generator=torch.Generator().manual_seed(seed)).tolist()[: samples or 128]

    def measure(module: nn.Module) -> dict[str, float]:
        correlation, difference = saliency.map_agreement(network.module, module, judged)
        return {"correlation": correlation, "mean abs. difference": difference}

    return Case("saliency", network, _pictures(network, [files[rest[i]] for i in drawn]), None, measure)


def _pictures(network: Network, files: Sequence[Path]) -> list[Batch]:
    return [network.preprocessing(read_images(files[i : i + 16])) for i in range(0, len(files), 16)]


def _prepared(network: Network, texts: Sequence[str]) -> list[Batch]:
    return [network.preprocessing(list(texts[i : i + _BATCH])) for i in range(0, len(texts), _BATCH)]


def _agreement(logits: Tensor, dense: Tensor) -> dict[str, float]:
    p, q = dense.log_softmax(1), logits.log_softmax(1)
    same = (logits.argmax(1) == dense.argmax(1)).double()
    divergence = (p.exp() * (p - q)).sum(1)
    count = len(same) ** 0.5
    return {
        "agreement": 100 * float(same.mean()),
        "agreement, standard error": 100 * float(same.std()) / count,
        "KL": float(divergence.mean()),
        "KL, standard error": float(divergence.std()) / count,
    }


def _correlation(a: Tensor, b: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a, b]))[0, 1])


# Name -> how to build it, and what of the data folder it needs.
CASES: dict[str, tuple[Callable[[Path, int, int | None], Case], str]] = {
    "stsb": (stsb, "stsb"),
    "sst2": (sst2, "minilm_sst2"),
    "resnet20": (resnet20, "resnet_cifar10"),
    "resnet56": (resnet56, "resnet_cifar10"),
    "saliency": (saliency_maps, "vit_small_saliency"),
}
