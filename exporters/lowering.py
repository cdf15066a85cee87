"""Convert an exported float32 program to float16 or bfloat16, operator by operator.

The graph is changed instead of the module, because it shows what forward computes itself: masks, positions, scales. The
rules follow torch.autocast:

- Matrix products, convolutions and attention take and return the low type.
- Norms compute in float32 where ONNX does not do so inside of the operator. So do operators whose values leave the low
  type's range or lose their digits in it (powers, exponentials, logarithms, sums), and what forward casts to float32.
- Values computed without an activation (constants, buffers, positions, masks of integer inputs) stay float32. Where
  they meet an activation of the low type, they are clamped to that type's finite range.
- Operators with a number that the low type cannot hold, such as an epsilon of 1e-8, compute in float32.
- Other operators compute in the widest type of their inputs.

Inputs and outputs stay float32.
"""

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
_CONVOLUTIONS = {"convolution", *(f"{name}{n}d" for name in ("conv", "conv_transpose") for n in (1, 2, 3))}
_LOW = {
    *_CONVOLUTIONS,
    *("linear", "addmm", "addmv", "bilinear", "scaled_dot_product_attention"),
    *("lstm", "gru", "rnn_tanh", "rnn_relu"),
}
# Their statistics run over whole rows or images. ONNX's LayerNormalization computes in float32 for any input type.
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
# Operators that only move the values of one tensor.
_MOVES = {
    *("slice", "select", "view", "reshape", "_unsafe_view", "expand", "expand_as", "transpose", "permute", "t"),
    *("unsqueeze", "squeeze", "flatten", "unflatten", "clone", "contiguous", "alias", "detach", "detach_", "index"),
    *("index_select", "gather", "embedding", "repeat", "movedim", "mT", "view_as", "lift_fresh_copy", "flip", "roll"),
}
_ARITHMETIC = {"add", "sub", "rsub", "mul", "div", "addcmul", "addcdiv", "maximum", "fmod", "remainder", "clamp_min"}
_BOUNDED = {"masked_fill", "where", "clamp", "clamp_max", "fill", "hardtanh", "threshold", "constant_pad_nd", "pad"}


def lower_program(
    program: torch.export.ExportedProgram, dtype: torch.dtype, *, convolutions: bool = True
) -> torch.export.ExportedProgram:
    """Return the float32 ``program``, as `trace` made it, in ``dtype``.

    Args:
        convolutions: whether convolutions have ``dtype``, too; otherwise they stay float32.

    Raises:
        ExportError: an operator cannot be computed in ``dtype``; the message names the operator and its module.
    """
    functional = _make_functional(program)
    lowering = _Lowering(functional, dtype, convolutions)
    for node in list(functional.graph.nodes):
        lowering.lower(node)
    return lowering.finish()


def _make_functional(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """Return the program without operators that write into their input and without graphs inside its graph."""
    nodes = [node for node in program.graph.nodes if node.op == "call_function"]
    for node in nodes:
        # run_decompositions would drop these casts, but they show what forward wants in float32.
        if node.target is _aten.to.dtype and _dtype(node.args[0]) == torch.float32 == node.args[1]:
            node.args = (node.args[0], torch.float32, False, True)
    if any(_writes(node) or isinstance(node.target, torch._ops.HigherOrderOperator) for node in nodes):
        try:
            with torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                program = program.run_decompositions({})
        except Exception as error:  # torch raises many unrelated types
            raise ExportError(f"torch cannot decompose the program for half precision: {first_line(error)}") from error
    for node in program.graph.nodes:
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            raise ExportError(
                f"{_where(node)} uses {node.target}, which cannot be computed in half precision: take fp32"
            )
    return program


def _writes(node: Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable and node.target is not _aten.detach_.default


class _Lowering:
    """One walk over a program's graph, which it changes in place.

    Attributes:
        current: replacement of each node.
        low: form of each node in the low type.
        wide: form of each node in float32.
        free: nodes that depend on no activation.
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
            self._select_output(node)
            return
        was_float = _dtype(node) == torch.float32
        node.args = map_arg(node.args, lambda n: self.current.get(n, n))
        node.kwargs = map_arg(node.kwargs, lambda n: self.current.get(n, n))
        floats = [n for n in node.all_input_nodes if _dtype(n) in (torch.float32, self.dtype)]
        activations = [n for n in floats if n not in self.free]
        if not activations:
            self.free.add(node)
        low = [n for n in activations if _dtype(n) == self.dtype]
        if name in _CASTS or name in _LIKE or not floats:
            self._cast_or_create(node, name, was_float, activations)
        elif name in _LOW - self.kept or (name in _PRODUCTS and (low or any(self._is_weight(n) for n in floats))):
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
                self._return_low(node)
        elif len(low) == len(activations) and low and not self._wants_float32(node, name):
            self._clamp_numbers(node, name)
            self._drop_float32(node, name)
            self._run(node, self.in_range)
        elif activations:
            self._run(node, self.in_float32)
        else:
            self._run(node, lambda n: n)

    def _select_output(self, node: Node) -> None:
        """Handle ``getitem``: one of several tensors that an operator returns."""
        source = node.args[0]
        assert isinstance(source, Node)
        self._infer(node)
        if source in self.free:
            self.free.add(node)
        elif _name(source) in self.kept and node.args[1] == 0:
            self._return_low(node)

    def _cast_or_create(self, node: Node, name: str, was_float: bool, activations: list[Node]) -> None:
        """Handle a cast, or an operator that creates a tensor without the values of another."""
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
        """Return whether an operator on activations of the low type must compute in float32."""
        square = name == "mul" and len(node.args) == 2 and node.args[0] is node.args[1]
        return name in _WIDE or square or any(self._beyond(name, number) for number in self._numbers(node, name))

    def _numbers(self, node: Node, name: str) -> Iterator[float]:
        """Yield the numbers that an operator computes with, attributes left out."""
        if name not in _ARITHMETIC | _BOUNDED:
            return
        for value in (*node.args, *node.kwargs.values()):
            if isinstance(value, int | float) and not isinstance(value, bool):
                yield value
            elif name in _ARITHMETIC and (leaf := _leaf(value)) is not None and leaf.name in self.leaves:
                tensor = self._tensors_of(leaf)[self.leaves[leaf.name]]
                if tensor.numel() == 1:
                    yield float(tensor)

    def _tensors_of(self, leaf: Node) -> dict[str, Any]:
        """Return the program's dictionary that has the tensor of one of its leaves."""
        state = self.program.state_dict
        return state if self.leaves[leaf.name] in state else self.program.constants

    def _beyond(self, name: str, number: float) -> bool:
        if number == 0 or not math.isfinite(number):
            return False
        tiny = abs(number) < self.limits.tiny and name not in _BOUNDED - {"clamp", "clamp_max"}
        return tiny or (abs(number) > self.limits.max and name in _ARITHMETIC - {"clamp_min"})

    def _clamp_numbers(self, node: Node, name: str) -> None:
        """Clamp the numbers by which the operator replaces others to the range of the low type."""
        if name in _BOUNDED | {"clamp_min"}:
            most = self.limits.max

            def clamped(value: Any) -> Any:
                number = isinstance(value, int | float) and not isinstance(value, bool)
                return max(-most, min(most, value)) if number and math.isfinite(value) else value

            node.args = tuple(clamped(a) for a in node.args)
            node.kwargs = {k: clamped(v) for k, v in node.kwargs.items()}

    def _drop_float32(self, node: Node, name: str) -> None:
        """Drop a request for float32: softmax computes in it anyway, and the result is rounded next."""
        if name == "softmax" and len(node.args) > 2:
            node.args = node.args[:2]
        if name in ("softmax", "mean"):
            node.kwargs = {k: v for k, v in node.kwargs.items() if k != "dtype"}

    def _run(self, node: Node, form: Callable[[Node], Node]) -> None:
        """Give the operator its inputs in a form, and infer the type of its result."""
        args, kwargs = node.args, node.kwargs
        node.args, node.kwargs = map_arg(node.args, form), map_arg(node.kwargs, form)
        try:
            self._infer(node)
        except Exception:
            # No rule above names this operator, and it needs all of its inputs in one type.
            node.args, node.kwargs = map_arg(args, self.in_float32), map_arg(kwargs, self.in_float32)
            try:
                self._infer(node)
            except Exception as error:
                raise ExportError(
                    f"{_where(node)}: {node.target} cannot be computed next to half precision ({first_line(error)}): "
                    "take fp32"
                ) from error

    def _infer(self, node: Node) -> None:
        values = map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
        # Without Python's dispatcher some operators replace a dynamic size by the sample's.
        with self.fake, enable_python_dispatcher(), torch.no_grad():
            node.meta["val"] = node.target(*values[0], **values[1])  # type: ignore[operator]
        node.meta.pop("tensor_meta", None)

    def _return_low(self, node: Node) -> None:
        """Let all users of an operator that computes in float32 take its result in the low type."""
        if _dtype(node) == torch.float32:
            cast = self._cast(node, self.dtype)
            self.current[node], self.wide[cast] = cast, node

    def in_low(self, node: Node) -> Node:
        """Return a float32 value in the low type."""
        return self._in_low(node, bounded=False) if _dtype(node) == torch.float32 else node

    def in_range(self, node: Node) -> Node:
        """Return a float32 value in the low type, clamped to its finite range where it depends on no activation."""
        return self._in_low(node, bounded=node in self.free) if _dtype(node) == torch.float32 else node

    def _in_low(self, node: Node, bounded: bool) -> Node:
        if node not in self.low:
            source = node.args[0] if node.args and isinstance(node.args[0], Node) else None
            # Weights are clamped when they are stored.
            clamped = bounded and not (node.op == "placeholder" and node.name in self.leaves)
            if node in self.free and source is not None and _name(node) in _MOVES and _dtype(source) == torch.float32:
                # A weight that is only moved is stored in the low type.
                moved = (self._in_low(source, bounded), *node.args[1:])
                self.low[node] = self._insert(node, node.target, moved, dict(node.kwargs))
            else:
                self.low[node] = self._cast(self._clamp(node) if clamped else node, self.dtype)
        return self.low[node]

    def in_float32(self, node: Node) -> Node:
        """Return a value of the low type in float32."""
        if _dtype(node) != self.dtype:
            return node
        if node not in self.wide:
            self.wide[node] = self._cast(node, torch.float32)
            self.low[self.wide[node]] = node
        return self.wide[node]

    def _is_weight(self, node: Any) -> bool:
        """Return whether a node is a parameter, moved perhaps."""
        leaf = _leaf(node)
        return leaf is not None and leaf.name in self.parameters

    def _cast(self, node: Node, dtype: torch.dtype) -> Node:
        return self._insert(node, _aten._to_copy.default, (node,), {"dtype": dtype})

    def _clamp(self, node: Node) -> Node:
        return self._insert(node, _aten.clamp.default, (node, self.limits.min, self.limits.max), {})

    def _insert(self, source: Node, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Node:
        """Insert an operator after ``source``, or after all inputs where ``source`` is one of them."""
        at = self.last_input if source.op == "placeholder" else source
        assert at is not None
        while at.next.op == "placeholder":
            at = at.next
        with self.graph.inserting_after(at):
            made = self.graph.call_function(target, args, kwargs)
        made.meta = {key: value for key, value in source.meta.items() if key in ("nn_module_stack", "stack_trace")}
        self._infer(made)
        if source in self.free:
            self.free.add(made)
        return made

    def _name_outputs(self, node: Node) -> None:
        """Update the names of the outputs in the signature."""
        for spec, value in zip(self.program.graph_signature.output_specs, node.args[0], strict=True):  # type: ignore[arg-type]
            if isinstance(value, Node):
                spec.arg.name = value.name

    def finish(self) -> torch.export.ExportedProgram:
        """Return the program; weights that are only used in the low type are stored in it."""
        self.graph.eliminate_dead_code()
        state, constants = dict(self.program.state_dict), dict(self.program.constants)
        made: dict[int, Tensor] = {}
        for node in self.graph.find_nodes(op="placeholder"):
            if node.name not in self.leaves or node not in self.low:
                continue
            target, cast = self.leaves[node.name], self.low[node]
            tensors = state if target in state else constants
            tensor = tensors[target]
            if set(node.users) == {cast}:
                if id(tensor) not in made:
                    made[id(tensor)] = _to_stored(tensor, self.dtype)
                tensors[target], node.meta["val"] = made[id(tensor)], cast.meta["val"]
                cast.replace_all_uses_with(node)
                self.graph.erase_node(cast)
            elif bool((tensor.abs() > self.limits.max).any()):
                cast.args = (self._clamp(node),)
        self.graph.lint()
        self.program.graph_module.recompile()
        return torch.export.ExportedProgram(
            root=self.program.graph_module,
            graph=self.graph,
            graph_signature=self.program.graph_signature,
            state_dict=state,
            range_constraints=self.program.range_constraints,
            module_call_graph=self.program.module_call_graph,
            example_inputs=self.program.example_inputs,
            constants=constants,
            verifiers=self.program.verifiers,
        )


def _to_stored(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a weight clamped and rounded to ``dtype``."""
    limits = torch.finfo(dtype)
    stored = tensor.detach().clamp(limits.min, limits.max).to(dtype)
    return torch.nn.Parameter(stored, requires_grad=False) if isinstance(tensor, torch.nn.Parameter) else stored


def _leaf(node: Any) -> Node | None:
    """Return the input of the graph that a value comes from by moves alone."""
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
    """Return the module that an operator belongs to, for a message."""
    stack: Iterable[Any] = (node.meta.get("nn_module_stack") or {}).values()
    path, kind = (list(stack) or [("", "the network")])[-1][:2]
    kind = kind if isinstance(kind, str) else kind.__qualname__
    return f"{kind.rpartition('.')[2]} {path}".strip()
