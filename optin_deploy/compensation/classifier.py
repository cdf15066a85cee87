"""Compensation of a classifier's last layer: its classes follow the dense network's in distribution.

`refit` brings the logits close to the dense network's in squares. Their softmax depends little on most of a logit's
size. Here the same layer is fitted to the class probabilities p of the dense network (multinomial regression on soft
targets, a convex problem without labels):

    min over W of  mean over rows of KL(p ‖ softmax([x, 1] W)) + λ/2 · |W − W₀|²

with x the layer's input in the compensated network and W₀ its weights there. λ is relative to the mean squared feature
and is chosen on held-out batches.

- If every logit is a yes or no (``nn.task_head``), p are the probabilities of yes, and KL is the sum over the logits of
  the divergences of Bernoulli distributions. One logit is the difference of two classes, of which each moves half the
  way, so the pull is half as strong and the fit is the same.
- Plain numbers y are fitted in squares, ½ |y − [x, 1] W|² instead of KL. `refit` does that too, but not after tokens
  were merged.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

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
# Relative to the mean squared feature. W₀ was fitted on the held-out rows too, so they favour too strong pulls.
STRENGTHS = (0.003, 0.01, 0.03, 0.1)
# Most weights that are fitted, enough for 1,000 classes of 1,024 features; a vocabulary has more.
_MOST_WEIGHTS = 2**21
# Most numbers in the features and probabilities of all rows.
_MOST_NUMBERS = 2**24
_ITERATIONS = 100


@torch.no_grad()
def refit_classifier(
    network: Network, pruned: nn.Module, batches: Sequence[Batch], strengths: Sequence[float] = STRENGTHS
) -> None:
    """Fit the layer that returns the logits of ``pruned`` to the dense network's probabilities or numbers, in place.

    Nothing changes if there are no logits, if they are not the output of one linear layer, or if no strength fits
    better on held-out batches than the present weights.
    """
    name = logits_layer(network, pruned, batches[0]) if batches else None
    if name is None:
        return
    layer = pruned.get_submodule(name)
    assert isinstance(layer, nn.Linear)
    bias = layer.bias if isinstance(layer.bias, Tensor) else None
    last = torch.zeros_like(layer.weight[:, 0]) if bias is None else bias
    old = torch.cat([layer.weight.T, last[None]]).double()
    if old.numel() > _MOST_WEIGHTS:
        return

    def fit_layer() -> Tensor:
        rows = _rows(network, pruned, name, batches, len(strengths) > 1)
        return fit(rows, old, strengths, bias=bias is not None, head=network.head)

    # One process does it: it is short, and needs the rows of all batches together.
    solution = ranks_of(batches).broadcast(fit_layer, old)
    layer.weight.copy_(solution[:-1].T)
    if bias is not None:
        bias.copy_(solution[-1])


def logits_layer(network: Network, module: nn.Module, batch: Batch) -> str | None:
    """Return the name of the linear layer whose output is the class logits, if there is one with weights of its own."""
    if network.logits is None:
        return None
    weights = [id(p) for m in module.modules() for n, p in m.named_parameters(recurse=False) if n == "weight"]
    first = network.forward(batch, module)[network.logits]
    classes = first.shape[-1] if first.dim() > 1 else 1
    # Outputs of other layers are not stored: they would take far more memory than the forward pass.
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


@dataclass(frozen=True)
class Rows:
    """Inputs of the layer and its targets, float64.

    Attributes:
        x: features ``(rows, features)``.
        p: probabilities or numbers ``(rows, classes)``.
        held_out: bool ``(rows,)``: rows that the strength is chosen on.
    """

    x: Tensor
    p: Tensor
    held_out: Tensor


def fit(rows: Rows, old: Tensor, strengths: Sequence[float], *, bias: bool, head: HeadKind = "classes") -> Tensor:
    """Return weights ``(features + 1, classes)``; the last row is the bias.

    Without held-out rows, the middle strength is taken.

    Args:
        old: weights that the new ones are pulled to, float64.
        strengths: of the pull, relative to the mean squared feature.
        bias: False keeps the last row as it is.
        head: kind of the targets: probabilities of classes, of a yes in every column, or plain numbers.
    """
    p, held_out = rows.p, rows.held_out
    strengths = [strength / 2 for strength in strengths] if head == "binary" else strengths
    x = torch.cat([rows.x, rows.x.new_ones(len(rows.x), 1)], dim=1)
    minimise = partial(_minimise, old=old, bias=bias, loss=_LOSSES[head])
    if not held_out.any():
        return minimise(x, p, old, strengths[len(strengths) // 2])
    training, start = ~held_out, old
    best, least = None, _error(x[held_out] @ old, p[held_out], head)
    # From the strongest pull on, each starts at the solution of the one before.
    for strength in sorted(strengths, reverse=True):
        start = minimise(x[training], p[training], start, strength)
        error = _error(x[held_out] @ start, p[held_out], head)
        if error < least:
            best, least = (strength, start), error
    return old if best is None else minimise(x, p, best[1], best[0])


def _minimise(x: Tensor, p: Tensor, start: Tensor, strength: float, *, old: Tensor, bias: bool, loss: _Loss) -> Tensor:
    """Solve the problem of this module by L-BFGS."""
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
    """Return the mean over rows of KL(p ‖ q), up to a constant, and its derivative for each row."""
    log_q = logits.log_softmax(1)
    return -float((p * log_q).sum() / len(p)), log_q.exp() - p


def _sigmoid_loss(logits: Tensor, p: Tensor) -> tuple[float, Tensor]:
    """Return the same for Bernoulli distributions, summed over the columns."""
    log_q = p * F.logsigmoid(logits) + (1 - p) * F.logsigmoid(-logits)
    return -float(log_q.sum() / len(p)), logits.sigmoid() - p


def _squared_loss(logits: Tensor, numbers: Tensor) -> tuple[float, Tensor]:
    """Return half the squared difference, summed over columns, as a mean over rows, and each row's derivative."""
    difference = logits - numbers
    return float(difference.square().sum() / (2 * len(numbers))), difference


_LOSSES: Mapping[HeadKind, _Loss] = {
    "classes": _softmax_loss,
    "binary": _sigmoid_loss,
    "regression": _squared_loss,
}


def _rows(network: Network, pruned: nn.Module, name: str, batches: Sequence[Batch], several: bool) -> Rows:
    """Return the layer's inputs and the dense network's probabilities or numbers."""
    assert network.logits is not None
    xs, ps, held_out = [], [], []
    for index, batch in enumerate(batches):
        valid = network.valid_tokens(batch)
        logits = network.forward(batch)[network.logits]
        with record_inputs(pruned, (name,)) as inputs:
            pruned(**batch)
        logits = logits if logits.dim() > 1 else logits[:, None]
        x, p = valid_rows(inputs[name], valid), probabilities(network.head, valid_rows(logits, valid).double())
        rows = some_rows(len(x), _MOST_NUMBERS // (len(batches) * (x.shape[1] + p.shape[1])))
        xs.append(x[rows].double())
        ps.append(p[rows])
        out = several and is_held_out(index, len(batches))
        held_out.append(torch.full((len(ps[-1]),), out, device=x.device))
    return Rows(torch.cat(xs), torch.cat(ps), torch.cat(held_out))
