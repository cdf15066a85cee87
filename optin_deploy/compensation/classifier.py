"""Repair of the map that gives class logits: its classes follow the dense network's in distribution.

`compensation` brings the logits themselves near the dense network's, in squares. What becomes of them is a softmax,
for which most of a logit's size does not matter. Here the same map is fitted to the class probabilities p that the
dense network gives (multinomial regression on soft targets, a convex problem; no labels):

    min over W of  mean over rows of KL(p ‖ softmax([x, 1] W)) + λ/2 · |W − W₀|²

with x what the map is given in the repaired network and W₀ its weights there. λ is relative to the mean squared
feature, and chosen on held-out batches. Where every logit is a yes or no (``task_head``), p are the probabilities of
yes, and KL is the sum over the logits of that of Bernoulli distributions. One logit is the difference of two classes,
which come half the way each: the pull is half as strong then, and the fit the same. Plain numbers y are fitted in
squares, ½ |y − [x, 1] W|² in the place of KL: `compensation` does that too, but not behind merged tokens.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from optin_deploy.compensation.ridge import is_held_out
from optin_deploy.distributed.ranks import ranks_of
from optin_deploy.network import Network
from optin_deploy.nn.calls import same_tensor
from optin_deploy.nn.partial_forward import record_inputs, record_outputs
from optin_deploy.nn.task_head import HeadKind, probabilities
from optin_deploy.nn.unfold import some_rows, valid_rows

Batch = Mapping[str, Tensor]
_Loss = Callable[[Tensor, Tensor], tuple[float, Tensor]]
# Relative to the mean squared feature. W₀ has seen the held-out rows, which speak for more than is good.
STRENGTHS = (0.003, 0.01, 0.03, 0.1)
# Numbers in the weights that are fitted, as of 1,000 classes from 1,024 features: a vocabulary's are left alone.
_MOST_WEIGHTS = 2**21
# Features and probabilities of all rows together; a network with logits at every token has more.
_MOST_NUMBERS = 2**24
_ITERATIONS = 100


@torch.no_grad()
def refit_classifier(
    network: Network, pruned: nn.Module, batches: Sequence[Batch], strengths: Sequence[float] = STRENGTHS
) -> None:
    """Fit the map that gives the logits of ``pruned`` to the dense network's probabilities or numbers, in place.

    Nothing happens where there are no logits, or where they are not just what one linear layer gives, or where no
    strength does better on held-out batches than the weights as they are.
    """
    name = logits_map(network, pruned, batches[0]) if batches else None
    if name is None:
        return
    layer = pruned.get_submodule(name)
    assert isinstance(layer, nn.Linear)
    bias = layer.bias if isinstance(layer.bias, Tensor) else None
    last = torch.zeros_like(layer.weight[:, 0]) if bias is None else bias
    old = torch.cat([layer.weight.T, last[None]]).double()
    if old.numel() > _MOST_WEIGHTS:
        return

    def fitted() -> Tensor:
        x, p, held_out = _rows(network, pruned, name, batches, len(strengths) > 1)
        return fit(x, p, held_out, old, strengths, bias=bias is not None, head=network.head)

    # It is short work for one process, and the rows of all batches are needed together.
    solution = ranks_of(batches).broadcast(fitted, old)
    layer.weight.copy_(solution[:-1].T)
    if bias is not None:
        bias.copy_(solution[-1])


def logits_map(network: Network, module: nn.Module, batch: Batch) -> str | None:
    """Name of the linear layer of ``module`` whose output is the class logits, if there is one of its own weights."""
    if network.logits is None:
        return None
    weights = [id(p) for m in module.modules() for n, p in m.named_parameters(recurse=False) if n == "weight"]
    first = network.forward(batch, module)[network.logits]
    classes = first.shape[-1] if first.dim() > 1 else 1
    # What other layers give is not kept: it would take far more memory than running the network.
    layers = tuple(
        n
        for n, m in module.named_modules()
        if isinstance(m, nn.Linear) and m.out_features == classes and weights.count(id(m.weight)) == 1
    )
    with record_outputs(module, layers) as given:
        logits = network.forward(batch, module)[network.logits]
    # One logit for each sample may have lost its axis.
    shape = logits.shape if logits.dim() > 1 else (*logits.shape, 1)
    return next((n for n, output in given.items() if same_tensor(output, logits.reshape(shape))), None)


def fit(
    x: Tensor,
    p: Tensor,
    held_out: Tensor,
    old: Tensor,
    strengths: Sequence[float],
    *,
    bias: bool,
    head: HeadKind = "classes",
) -> Tensor:
    """Weights ``(features + 1, classes)``, the last row the bias, for rows ``x`` and probabilities (or numbers) ``p``.

    Args:
        x: ``(rows, features)``, float64, as all others.
        p: ``(rows, classes)``.
        held_out: bool ``(rows,)``: rows that the strength is chosen on; without any it is the middle one.
        old: weights that are pulled to.
        strengths: of the pull, relative to the mean squared feature.
        bias: False leaves the last row as it is.
        head: what ``p`` are: probabilities of classes, or of a yes in every column, or plain numbers.
    """
    loss = _LOSSES[head]
    strengths = [strength / 2 for strength in strengths] if head == "binary" else strengths
    x = torch.cat([x, x.new_ones(len(x), 1)], dim=1)
    if not held_out.any():
        return _solved(x, p, old, old, strengths[len(strengths) // 2], bias, loss)
    training, start = ~held_out, old
    best, least = None, _error(x[held_out] @ old, p[held_out], head)
    # From the strongest pull on, each starts where the one before has ended.
    for strength in sorted(strengths, reverse=True):
        start = _solved(x[training], p[training], old, start, strength, bias, loss)
        error = _error(x[held_out] @ start, p[held_out], head)
        if error < least:
            best, least = (strength, start), error
    return old if best is None else _solved(x, p, old, best[1], best[0], bias, loss)


def _solved(x: Tensor, p: Tensor, old: Tensor, start: Tensor, strength: float, bias: bool, loss: _Loss) -> Tensor:
    """The minimum of the module's problem by L-BFGS."""
    pull = torch.full_like(old[:, :1], float(strength * x[:, :-1].square().mean().clamp_min(1e-12)))
    pull[-1] = 0.0
    weights = start.clone()
    search = torch.optim.LBFGS(
        [weights], max_iter=_ITERATIONS, tolerance_grad=1e-9, history_size=10, line_search_fn="strong_wolfe"
    )

    def closure() -> float:
        error, difference = loss(x @ weights, p)
        weights.grad = x.T @ difference / len(x) + pull * (weights - old)
        if not bias:
            weights.grad[-1] = 0.0
        return float((pull * (weights - old).square()).sum() / 2 + error)

    search.step(closure)
    return weights


def _error(logits: Tensor, p: Tensor, head: HeadKind) -> float:
    return float(F.cross_entropy(logits, p)) if head == "classes" else _LOSSES[head](logits, p)[0]


def _softmax_loss(logits: Tensor, p: Tensor) -> tuple[float, Tensor]:
    """The mean over rows of KL(p ‖ q) but for what does not depend on the logits, and each row's derivative."""
    log_q = logits.log_softmax(1)
    return -float((p * log_q).sum() / len(p)), log_q.exp() - p


def _sigmoid_loss(logits: Tensor, p: Tensor) -> tuple[float, Tensor]:
    """The same for Bernoulli distributions, summed over the columns."""
    log_q = p * F.logsigmoid(logits) + (1 - p) * F.logsigmoid(-logits)
    return -float(log_q.sum() / len(p)), logits.sigmoid() - p


def _squared_loss(logits: Tensor, numbers: Tensor) -> tuple[float, Tensor]:
    """Half the squared difference, summed over the columns, as a mean over rows, and each row's derivative."""
    difference = logits - numbers
    return float(difference.square().sum() / (2 * len(numbers))), difference


_LOSSES: Mapping[HeadKind, _Loss] = {
    "classes": _softmax_loss,
    "binary": _sigmoid_loss,
    "regression": _squared_loss,
}


def _rows(
    network: Network, pruned: nn.Module, name: str, batches: Sequence[Batch], several: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """What the map is given, the dense network's probabilities or numbers, and which rows are held out; float64."""
    assert network.logits is not None
    xs, ps, held_out = [], [], []
    for index, batch in enumerate(batches):
        valid = network.valid_tokens(batch)
        logits = network.forward(batch)[network.logits]
        with record_inputs(pruned, (name,)) as given:
            pruned(**batch)
        logits = logits if logits.dim() > 1 else logits[:, None]
        x, p = valid_rows(given[name], valid), probabilities(network.head, valid_rows(logits, valid).double())
        rows = some_rows(len(x), _MOST_NUMBERS // (len(batches) * (x.shape[1] + p.shape[1])))
        xs.append(x[rows].double())
        ps.append(p[rows])
        out = several and is_held_out(index, len(batches))
        held_out.append(torch.full((len(ps[-1]),), out, device=x.device))
    return torch.cat(xs), torch.cat(ps), torch.cat(held_out)
