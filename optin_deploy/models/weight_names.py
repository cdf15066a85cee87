"""By which names a file of weights holds those of a network.

Training scripts save a network from inside of others: data parallel and compiled ones, a training module, a moving
average (EMA) beside the weights themselves. Each puts a prefix before all names. What is in a file is sorted into
*parts*, each of one prefix, under which the network's own names are found.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from optin_deploy.errors import UserError

PLAIN = "plain"
"""What a part without prefix is called."""
# Inserted by torch.compile, FSDP, activation checkpointing and DeepSpeed wherever they wrap a module.
_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"}
# First names of what training scripts save beside a network, which takes no part in its forward pass.
_OF_TRAINING = re.compile(
    r"(n_averaged|num_updates|epoch|global_step|step|iteration|iter|decay|lr|best\w*|optim\w*|lr_\w+|\w*scheduler\w*|scaler|"
    r"amp|initted|callbacks|loops|hyper_parameters|rng\w*|\w*_rng_state|(train|val|test|valid)_\w+|\w*metrics?|\w*criterion\w*|"
    r"\w*loss\w*)(\.|$)"
)


@dataclass(frozen=True)
class Part:
    """A part of a file.

    Attributes:
        prefix: what stands before the network's names, with the dot at its end.
        found: the network's name -> the file's.
    """

    prefix: str
    found: Mapping[str, str]

    @property
    def label(self) -> str:
        """How it is named after ``#``."""
        return self.prefix.removesuffix(".") or PLAIN


def unwrapped(names: Collection[str]) -> dict[str, str]:
    """Name without the wrappers that torch inserts anywhere -> name; as they are where two names would become one."""
    without = {".".join(p for p in name.split(".") if p not in _WRAPPERS): name for name in names}
    return without if len(without) == len(names) else {name: name for name in names}


def parts_of(names: Collection[str], own: Collection[str]) -> list[Part]:
    """The parts of a file with ``names`` that hold at least half of the names in ``own`` each; the fullest comes first.

    A name belongs to one part. Without such a part there is none.
    """
    needed = set(own)
    found: dict[str, dict[str, str]] = {}
    for name in names:
        words = name.split(".")
        for i in range(len(words)):
            rest = ".".join(words[i:])
            if rest in needed:
                found.setdefault(name[: len(name) - len(rest)], {})[rest] = name
    parts: list[Part] = []
    while found:
        prefix = max(found, key=lambda each: (len(found[each]), -len(each)))
        best = found.pop(prefix)
        if len(best) * 2 < len(needed):
            break
        parts.append(Part(prefix, best))
        used = set(best.values())
        found = {p: left for p, f in found.items() if (left := {n: o for n, o in f.items() if o not in used})}
    return parts


def chosen(parts: Sequence[Part], wanted: str | None, path: object) -> Part:
    """The one part that is meant: the only one, or the one that ``wanted`` names by all of its prefix or a piece.

    Raises:
        UserError: several are there and nothing was said, or ``wanted`` names none or several of them.
    """
    labels = [part.label for part in parts]
    choices = " or ".join(f"--weights {path}#{label}" for label in labels)
    if wanted is None:
        if len(parts) == 1:
            return parts[0]
        raise UserError(f"weights file {path} holds the network {len(parts)} times: choose {choices}")
    for fits in (
        lambda label: label == wanted,
        lambda label: f".{wanted}." in f".{label}.",
        lambda label: wanted != "" and wanted.lower() in label.lower(),
    ):
        matching = [part for part in parts if fits(part.label)]
        if len(matching) == 1:
            return matching[0]
        if matching:
            break
    raise UserError(f"--weights {path}#{wanted} names no one part of the file: give {choices}")


def of_training(name: str) -> bool:
    """Whether a name is of what training scripts save beside a network."""
    return _OF_TRAINING.match(name) is not None


def listed(names: Sequence[str]) -> str:
    """The first of some names, and how many more there are."""
    return names[0] + f" ({len(names) - 1} more)" * (len(names) > 1)
