"""An exported float32 program computed in float16 or bfloat16, operator by operator.

The graph is changed and not the module: what forward makes itself (masks, positions, sinusoids, scales) is then known,
as are buffers, norms and their weights. The rules follow torch.autocast:

- Matrix products, convolutions and attention take and give the low type.
- Norms that ONNX gives no float32 inside, and operators whose values leave the low type's range or lose their digits in
  it (powers, exponentials, logarithms, sums), compute in float32. So does what a forward casts to float32 itself.
- What is computed without an activation (constants, buffers, positions, masks made of integer inputs) stays float32.
  Where it meets an activation of the low type it is brought into that type's finite range.
- Numbers in the graph that the low type cannot hold, like an epsilon of 1e-8, take their operator to float32.
- Anything else computes in the widest type that it is given.

Inputs and outputs stay float32.
"""

from __future__ import annotations

import math
import operator
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch._dispatch.python import enable_python_dispatcher
from torch._guards import detect_fake_mode
from torch.export.graph_signature import InputKind
from torch.fx import Node
from torch.fx.node import map_arg

from exporters.errors import ExportError, first_line

_aten = torch.ops.aten
_PRODUCTS = {"matmul", "mm", "bmm", "einsum", "baddbmm", "dot", "mv"}
_CONVOLUTIONS = {
    "conv1d",
    "conv2d",
    "conv3d",
    "convolution",
    "conv_transpose1d",
    "conv_transpose2d",
    "conv_transpose3d",
}
_LOW = {
    *_CONVOLUTIONS,
    *("linear", "addmm", "addmv", "bilinear", "scaled_dot_product_attention"),
    *("lstm", "gru", "rnn_tanh", "rnn_relu"),
}
# Their statistics run over whole rows or images. ONNX's LayerNormalization computes in float32 whatever it is given.
_NORMS = {"group_norm", "instance_norm", "batch_norm", "_native_batch_norm_legit_no_training", "rms_norm"}
_WIDE = {
    *("pow", "square", "exp", "exp2", "expm1", "log", "log2", "log10", "log1p", "rsqrt", "reciprocal", "logsumexp"),
    *("sum", "cumsum", "cumprod", "prod", "var", "std", "var_mean", "std_mean", "logcumsumexp", "logaddexp"),
    *("linalg_vector_norm", "norm", "cosine_similarity", "cdist", "_cdist_forward", "dist", "renorm"),
    *("softplus", "log_softmax", "_log_softmax", "sinh", "cosh", "tan", "acos", "asin", "erfinv", "acosh", "atanh"),
}
_CASTS = {"to", "_to_copy", "type_as"}
_LIKE = {
    *("zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like"),
    *("new_zeros", "new_ones", "new_full", "new_empty"),
}
# Of one tensor, which they only move.
_MOVES = {
    *("slice", "select", "view", "reshape", "_unsafe_view", "expand", "expand_as", "transpose", "permute", "t"),
    *("unsqueeze", "squeeze", "flatten", "unflatten", "clone", "contiguous", "alias", "detach", "detach_", "index"),
    *("index_select", "gather", "embedding", "repeat", "movedim", "mT", "view_as", "lift_fresh_copy", "flip", "roll"),
}
_ARITHMETIC = {"add", "sub", "rsub", "mul", "div", "addcmul", "addcdiv", "maximum", "fmod", "remainder", "clamp_min"}
_BOUNDED = {"masked_fill", "where", "clamp", "clamp_max", "fill", "hardtanh", "threshold", "constant_pad_nd", "pad"}


def lowered(
    program: torch.export.ExportedProgram, dtype: torch.dtype, *, convolutions: bool = True
) -> torch.export.ExportedProgram:
    """``program``, of float32 and as `trace` made it, in ``dtype``.

    Args:
        convolutions: whether these have ``dtype``, too, or stay float32.

    Raises:
        ExportError: an operator cannot be computed in it; the operator and its module are named.
    """
    functional = _functional(program)
    work = _Lowering(functional, dtype, convolutions)
    for node in list(functional.graph.nodes):
        work.lower(node)
    return work.finished()


def _functional(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """The program without operators that write into their input and without graphs inside its graph."""
    nodes = [node for node in program.graph.nodes if node.op == "call_function"]
    for node in nodes:
        # Would be dropped as casts to what is so already, and say what the forward wants in float32.
        if node.target is _aten.to.dtype and _dtype(node.args[0]) == torch.float32 == node.args[1]:
            node.args = (node.args[0], torch.float32, False, True)
    if any(_writes(node) or isinstance(node.target, torch._ops.HigherOrderOperator) for node in nodes):
        try:
            with torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                program = program.run_decompositions({})
        except Exception as error:  # torch raises many unrelated types
            raise ExportError(f"torch cannot take the program apart for half precision: {first_line(error)}") from error
    for node in program.graph.nodes:
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            raise ExportError(
                f"{_where(node)} computes by {node.target}, which has no form in half precision: take fp32"
            )
    return program


def _writes(node: Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable and node.target is not _aten.detach_.default


class _Lowering:
    """One walk over a program's graph, which it changes in place.

    ``current`` is what stands for a node, ``low`` and ``wide`` are its forms in the low type and in float32, and
    ``free`` the nodes that no activation has gone into.
    """

    def __init__(self, program: torch.export.ExportedProgram, dtype: torch.dtype, convolutions: bool) -> None:
        self.program, self.graph, self.dtype = program, program.graph, dtype
        self.limits = torch.finfo(dtype)
        self.kept = _NORMS if convolutions else _NORMS | _CONVOLUTIONS
        values = [node.meta.get("val") for node in self.graph.nodes]
        fake = detect_fake_mode(values)
        assert fake is not None  # torch.export traces with one
        self.fake = fake
        self.leaves = {
            spec.arg.name: spec.target
            for spec in program.graph_signature.input_specs
            if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)
        }
        self.parameters = set(program.graph_signature.inputs_to_parameters)
        self.current: dict[Node, Node] = {}
        self.low: dict[Node, Node] = {}
        self.wide: dict[Node, Node] = {}
        self.free: set[Node] = set()
        self.last_input: Node | None = None

    def lower(self, node: Node) -> None:
        if node.op == "placeholder":
            self.last_input = node
            self.free.add(node)
        elif node.op == "output":
            node.args = map_arg(node.args, lambda n: self.in_float32(self.current.get(n, n)))
            self._name_outputs(node)
        elif node.op == "call_function":
            if node.target is _aten._assert_tensor_metadata.default:
                self.graph.erase_node(node)
            else:
                self._compute(node)

    def _compute(self, node: Node) -> None:
        name = _name(node)
        if node.target is operator.getitem:
            self._take(node)
            return
        was_float = _dtype(node) == torch.float32
        node.args = map_arg(node.args, lambda n: self.current.get(n, n))
        node.kwargs = map_arg(node.kwargs, lambda n: self.current.get(n, n))
        given = [n for n in node.all_input_nodes if _dtype(n) in (torch.float32, self.dtype)]
        activations = [n for n in given if n not in self.free]
        if not activations:
            self.free.add(node)
        low = [n for n in activations if _dtype(n) == self.dtype]
        if name in _CASTS or name in _LIKE or not given:
            self._make(node, name, was_float, activations)
        elif name in _LOW - self.kept or (name in _PRODUCTS and (low or any(self._is_weight(n) for n in given))):
            self.free.discard(node)
            self._run(node, self.in_range if name == "scaled_dot_product_attention" else self.in_low)
        elif name == "embedding" and self._is_weight(node.args[0]):
            self.free.discard(node)
            self._run(node, self.in_low)
        elif name in self.kept or name == "layer_norm":
            self.free.discard(node)
            if name == "layer_norm" and low:
                self._run(node, self.in_low)
            else:
                self._run(node, self.in_float32)
                self._back(node)
        elif len(low) == len(activations) and low and not self._wants_float32(node, name):
            self._bound(node, name)
            self._drop_float32(node, name)
            self._run(node, self.in_range)
        elif activations:
            self._run(node, self.in_float32)
        else:
            self._run(node, lambda n: n)

    def _take(self, node: Node) -> None:
        """One of the tensors that an operator gives."""
        source = node.args[0]
        assert isinstance(source, Node)
        self._infer(node)
        if source in self.free:
            self.free.add(node)
        elif _name(source) in self.kept and node.args[1] == 0:
            self._back(node)

    def _make(self, node: Node, name: str, was_float: bool, activations: list[Node]) -> None:
        """A cast, or a tensor that is made without the values of another."""
        if name in _LIKE:
            self.free.add(node)
            if was_float:
                node.kwargs = {**node.kwargs, "dtype": torch.float32}
        if name == "type_as" and was_float:
            node.target, node.args = _aten.to.dtype, (node.args[0], torch.float32)
        self._run(node, lambda n: n)
        source = node.args[0] if node.args and isinstance(node.args[0], Node) else None
        if name in _CASTS and activations and source is not None and _dtype(node) == torch.float32:
            if _dtype(source) == self.dtype:
                self.low[node] = source
            elif _dtype(source) == torch.float32 and source in self.low:
                self.low[node] = self.low[source]

    def _wants_float32(self, node: Node, name: str) -> bool:
        """Whether an operator on activations of the low type cannot be trusted to it."""
        square = name == "mul" and len(node.args) == 2 and node.args[0] is node.args[1]
        return name in _WIDE or square or any(self._beyond(name, number) for number in self._numbers(node, name))

    def _numbers(self, node: Node, name: str) -> Iterator[float]:
        """The numbers that an operator computes with; those that are no more than attributes are left out."""
        if name not in _ARITHMETIC | _BOUNDED:
            return
        for value in (*node.args, *node.kwargs.values()):
            if isinstance(value, int | float) and not isinstance(value, bool):
                yield value
            elif name in _ARITHMETIC and (leaf := _leaf(value)) is not None and leaf.name in self.leaves:
                tensor = self._held(leaf)[self.leaves[leaf.name]]
                if tensor.numel() == 1:
                    yield float(tensor)

    def _held(self, leaf: Node) -> dict[str, Any]:
        """Where the program has the tensor of one of its leaves."""
        held = self.program.state_dict, self.program.constants
        return held[0] if self.leaves[leaf.name] in held[0] else held[1]

    def _beyond(self, name: str, number: float) -> bool:
        if number == 0 or not math.isfinite(number):
            return False
        tiny = abs(number) < self.limits.tiny and name not in _BOUNDED - {"clamp", "clamp_max"}
        return tiny or (abs(number) > self.limits.max and name in _ARITHMETIC - {"clamp_min"})

    def _bound(self, node: Node, name: str) -> None:
        """Bring the numbers that the operator puts in the place of others into the range of the low type."""
        if name in _BOUNDED | {"clamp_min"}:
            most = self.limits.max

            def bounded(value: Any) -> Any:
                number = isinstance(value, int | float) and not isinstance(value, bool)
                return max(-most, min(most, value)) if number and math.isfinite(value) else value

            node.args = tuple(bounded(a) for a in node.args)
            node.kwargs = {k: bounded(v) for k, v in node.kwargs.items()}

    def _drop_float32(self, node: Node, name: str) -> None:
        """A softmax that is to give float32 computes in it anyway, and its result is about to be rounded."""
        if name == "softmax" and len(node.args) > 2:
            node.args = node.args[:2]
        if name in ("softmax", "mean"):
            node.kwargs = {k: v for k, v in node.kwargs.items() if k != "dtype"}

    def _run(self, node: Node, form: Callable[[Node], Node]) -> None:
        """Give the operator its inputs in a form, and find what type it then gives."""
        given = node.args, node.kwargs
        node.args, node.kwargs = map_arg(node.args, form), map_arg(node.kwargs, form)
        try:
            self._infer(node)
        except Exception:
            # An operator that is not told above and wants all of its inputs in one type.
            node.args, node.kwargs = map_arg(given[0], self.in_float32), map_arg(given[1], self.in_float32)
            try:
                self._infer(node)
            except Exception as error:
                raise ExportError(
                    f"{_where(node)}: {node.target} cannot be computed beside half precision ({first_line(error)}): "
                    "take fp32"
                ) from error

    def _infer(self, node: Node) -> None:
        values = map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
        # Without Python's dispatcher some operators take a dynamic size for what it is in the sample.
        with self.fake, enable_python_dispatcher(), torch.no_grad():
            node.meta["val"] = node.target(*values[0], **values[1])  # type: ignore[operator]
        node.meta.pop("tensor_meta", None)

    def _back(self, node: Node) -> None:
        """Let all that take what was kept in float32 take it in the low type."""
        if _dtype(node) == torch.float32:
            cast = self._cast(node, self.dtype)
            self.current[node], self.wide[cast] = cast, node

    def in_low(self, node: Node) -> Node:
        """A float32 value in the low type."""
        return self._in_low(node, bounded=False) if _dtype(node) == torch.float32 else node

    def in_range(self, node: Node) -> Node:
        """The same, brought into its finite range where no activation is in it."""
        return self._in_low(node, bounded=node in self.free) if _dtype(node) == torch.float32 else node

    def _in_low(self, node: Node, bounded: bool) -> Node:
        if node not in self.low:
            source = node.args[0] if node.args and isinstance(node.args[0], Node) else None
            if node.op == "placeholder":
                # Weights are bounded as they are stored.
                bounded = bounded and node.name not in self.leaves
                self.low[node] = self._cast(self._clamped(node) if bounded else node, self.dtype)
            elif node in self.free and source is not None and _name(node) in _MOVES and _dtype(source) == torch.float32:
                # A weight that is only moved is stored in the low type.
                moved = self._copy(node, self._in_low(source, bounded))
                self.low[node] = moved
            else:
                self.low[node] = self._cast(self._clamped(node) if bounded else node, self.dtype)
        return self.low[node]

    def in_float32(self, node: Node) -> Node:
        """A value of the low type in float32."""
        if _dtype(node) != self.dtype:
            return node
        if node not in self.wide:
            self.wide[node] = self._cast(node, torch.float32)
            self.low[self.wide[node]] = node
        return self.wide[node]

    def _is_weight(self, node: Any) -> bool:
        """Whether it is a parameter, moved perhaps."""
        leaf = _leaf(node)
        return leaf is not None and leaf.name in self.parameters

    def _cast(self, node: Node, dtype: torch.dtype) -> Node:
        return self._insert(node, _aten._to_copy.default, (node,), {"dtype": dtype})

    def _clamped(self, node: Node) -> Node:
        return self._insert(node, _aten.clamp.default, (node, self.limits.min, self.limits.max), {})

    def _copy(self, node: Node, source: Node) -> Node:
        return self._insert(node, node.target, (source, *node.args[1:]), dict(node.kwargs))

    def _insert(self, behind: Node, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Node:
        """A new operator behind a node, or behind all inputs where it is one of them."""
        at = self.last_input if behind.op == "placeholder" else behind
        assert at is not None
        while at.next.op == "placeholder":
            at = at.next
        with self.graph.inserting_after(at):
            made = self.graph.call_function(target, args, kwargs)
        made.meta = {key: value for key, value in behind.meta.items() if key in ("nn_module_stack", "stack_trace")}
        self._infer(made)
        if behind in self.free:
            self.free.add(made)
        return made

    def _name_outputs(self, node: Node) -> None:
        """Let the signature name what is given instead of what was."""
        for spec, value in zip(self.program.graph_signature.output_specs, node.args[0], strict=True):  # type: ignore[arg-type]
            if isinstance(value, Node):
                spec.arg.name = value.name

    def finished(self) -> torch.export.ExportedProgram:
        """The program with the weights that are used in the low type alone stored in it."""
        self.graph.eliminate_dead_code()
        state, constants = dict(self.program.state_dict), dict(self.program.constants)
        made: dict[int, Tensor] = {}
        for node in self.graph.find_nodes(op="placeholder"):
            if node.name not in self.leaves or node not in self.low:
                continue
            target, cast = self.leaves[node.name], self.low[node]
            held = state if target in state else constants
            tensor = held[target]
            if set(node.users) == {cast}:
                if id(tensor) not in made:
                    made[id(tensor)] = _stored(tensor, self.dtype)
                held[target], node.meta["val"] = made[id(tensor)], cast.meta["val"]
                cast.replace_all_uses_with(node)
                self.graph.erase_node(cast)
            elif bool((tensor.abs() > self.limits.max).any()):
                cast.args = (self._clamped(node),)
        self.graph.lint()
        self.program.graph_module.recompile()
        return _rebuilt(self.program, state, constants)


def _stored(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    limits = torch.finfo(dtype)
    stored = tensor.detach().clamp(limits.min, limits.max).to(dtype)
    return torch.nn.Parameter(stored, requires_grad=False) if isinstance(tensor, torch.nn.Parameter) else stored


def _rebuilt(
    program: torch.export.ExportedProgram, state: dict[str, Any], constants: dict[str, Any]
) -> torch.export.ExportedProgram:
    return torch.export.ExportedProgram(
        root=program.graph_module,
        graph=program.graph,
        graph_signature=program.graph_signature,
        state_dict=state,
        range_constraints=program.range_constraints,
        module_call_graph=program.module_call_graph,
        example_inputs=program.example_inputs,
        constants=constants,
        verifiers=program.verifiers,
    )


def _leaf(node: Any) -> Node | None:
    """The input of the graph that a value is, moved perhaps."""
    while isinstance(node, Node) and node.op != "placeholder" and _name(node) in _MOVES:
        node = node.args[0]
    return node if isinstance(node, Node) and node.op == "placeholder" else None


def _name(node: Node) -> str:
    packet = getattr(node.target, "overloadpacket", None)
    return packet.__name__ if packet is not None else getattr(node.target, "__name__", str(node.target))


def _dtype(node: Any) -> torch.dtype | None:
    value = node.meta.get("val") if isinstance(node, Node) else None
    return value.dtype if isinstance(value, Tensor) else None


def _where(node: Node) -> str:
    """The module that an operator stands in, for a message."""
    stack: Iterable[Any] = (node.meta.get("nn_module_stack") or {}).values()
    path, kind = (list(stack) or [("", "the network")])[-1][:2]
    kind = kind if isinstance(kind, str) else kind.__qualname__
    return f"{kind.rpartition('.')[2]} {path}".strip()
