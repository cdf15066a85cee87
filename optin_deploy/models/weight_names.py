"""Match the names of tensors in a file of weights to those of a network.

Training scripts save a network inside of wrappers: data parallel and compiled modules, a training module, a moving
average (EMA) next to the weights themselves. Each puts a prefix before all names. The tensors of a file are sorted into
*parts*: a part has one prefix, and after it the network's own names.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from optin_deploy.errors import UserError

PLAIN = "plain"
"""Label of the part without prefix."""
# Inserted by torch.compile, FSDP, activation checkpointing and DeepSpeed wherever they wrap a module.
_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"}
# First names of values that training scripts save next to a network and that its forward pass does not need.
_OF_TRAINING = re.compile(
    r"(n_averaged|num_updates|epoch|global_step|step|iteration|iter|decay|lr|best\w*|optim\w*|lr_\w+|\w*scheduler\w*|scaler|"
    r"amp|initted|callbacks|loops|hyper_parameters|rng\w*|\w*_rng_state|(train|val|test|valid)_\w+|\w*metrics?|\w*criterion\w*|"
    r"\w*loss\w*)(\.|$)"
)


@dataclass(frozen=True)
class Part:
    """A part of a file.

    Attributes:
        prefix: the string before the network's names, with the dot at its end.
        names: the network's name -> the file's.
    """

    prefix: str
    names: Mapping[str, str]

    @property
    def label(self) -> str:
        """Its name after ``#`` in ``--weights FILE#PART``."""
        return self.prefix.removesuffix(".") or PLAIN


def unwrap_names(names: Collection[str]) -> dict[str, str]:
    """Return name without torch's wrappers -> name; all names unchanged if two of them would become the same."""
    plain = {".".join(p for p in name.split(".") if p not in _WRAPPERS): name for name in names}
    return plain if len(plain) == len(names) else {name: name for name in names}


def find_parts(names: Collection[str], own: Collection[str]) -> list[Part]:
    """Return the parts of a file that hold at least half of the network's names, the largest first.

    A name belongs to one part only.

    Args:
        names: the file's names.
        own: the network's names.
    """
    needed = set(own)
    candidates: dict[str, dict[str, str]] = {}
    for name in names:
        words = name.split(".")
        for i in range(len(words)):
            rest = ".".join(words[i:])
            if rest in needed:
                candidates.setdefault(name[: len(name) - len(rest)], {})[rest] = name
    parts: list[Part] = []
    while candidates:
        sizes = {prefix: len(matched) for prefix, matched in candidates.items()}
        prefix = max(sizes, key=lambda p: (sizes[p], -len(p)))
        largest = candidates.pop(prefix)
        if len(largest) * 2 < len(needed):
            break
        parts.append(Part(prefix, largest))
        used = set(largest.values())
        remaining = {p: {n: o for n, o in matched.items() if o not in used} for p, matched in candidates.items()}
        candidates = {p: matched for p, matched in remaining.items() if matched}
    return parts


def choose_part(parts: Sequence[Part], wanted: str | None, path: object) -> Part:
    """Return the only part, or the one that ``wanted`` names by its whole prefix or a piece of it.

    Raises:
        UserError: there are several and ``wanted`` is None, or it matches none or several of them.
    """
    labels = [part.label for part in parts]
    choices = " or ".join(f"--weights {path}#{label}" for label in labels)
    if wanted is None:
        if len(parts) == 1:
            return parts[0]
        raise UserError(f"weights file {path} holds the network {len(parts)} times: choose {choices}")
    for matches in (
        lambda label: label == wanted,
        lambda label: f".{wanted}." in f".{label}.",
        lambda label: wanted != "" and wanted.lower() in label.lower(),
    ):
        matching = [part for part in parts if matches(part.label)]
        if len(matching) == 1:
            return matching[0]
        if matching:
            break
    raise UserError(f"--weights {path}#{wanted} does not name one part of the file: give {choices}")


def is_training_name(name: str) -> bool:
    """Whether a training script saves a value of this name next to a network."""
    return _OF_TRAINING.match(name) is not None


def first_and_count(names: Sequence[str]) -> str:
    """Return the first of some names and the number of the others."""
    return names[0] + f" ({len(names) - 1} more)" * (len(names) > 1)
