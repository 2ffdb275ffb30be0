"""Which modules feed a module and which it feeds: read from a torch.fx trace, else from the order of registration."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch.nn.modules import activation, dropout, padding, pooling
from torch.nn.modules.conv import _ConvNd

from tdeconv.holders import restored

INPUT, OUTPUT, UNKNOWN = "the model's input", "the model's output", "unknown"

End = nn.Module | str
"""Where data comes from or goes to: a module, INPUT, OUTPUT, UNKNOWN, or the name of an operation."""


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# What returns the memory it was given, or may.
_ALIASING = _words("""
    dropout dropout1d dropout2d dropout3d alpha_dropout feature_alpha_dropout flatten unflatten reshape reshape_as view
    view_as contiguous to float half bfloat16 double type_as squeeze unsqueeze chunk split tensor_split narrow select
    getitem
""")
_ALIASING_MODULES = (nn.Identity, nn.Flatten, nn.Unflatten, dropout._DropoutNd)
# What leaves each channel's values a channel's values: these may stand between a layer and its normalisation.
_PASSING = _ALIASING | _words("""
    relu relu6 rrelu leaky_relu prelu elu selu celu gelu silu mish hardswish hardsigmoid hardtanh softplus softsign
    sigmoid logsigmoid tanh clamp clamp_min clamp_max avg_pool1d avg_pool2d avg_pool3d max_pool1d max_pool2d max_pool3d
    lp_pool1d lp_pool2d lp_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d
    adaptive_max_pool2d adaptive_max_pool3d mean amax pad interpolate pixel_shuffle pixel_unshuffle channel_shuffle
    clone cat concat concatenate
""")
_PASSING_MODULES = (
    *(getattr(activation, name) for name in activation.__all__ if name != "MultiheadAttention"),
    *(getattr(module, name) for module in (padding, pooling) for name in module.__all__),
    *(*_ALIASING_MODULES, nn.Upsample, nn.ChannelShuffle, nn.PixelShuffle, nn.PixelUnshuffle),
)
# What may leave one value of a whole map.
_POOLING = _words("""
    adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d
    adaptive_max_pool3d mean amax
""") | {getattr(pooling, name) for name in pooling.__all__ if name.startswith("Adaptive")}
# What returns new memory that its own gradient does not read.
_FRESH = _words("add sub cat concat concatenate")
# torch.fx records ``x += y`` as ``x + y``.
_AUGMENTED = _words("add sub mul truediv floordiv mod pow and or xor lshift rshift matmul")
# What computes as a convolution or linear layer does.
LINEAR_MAPS = _words("""
    conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d linear matmul mm bmm addmm einsum
""")
# What returns memory of its own: of all other operations it is not known.
_NEW = LINEAR_MAPS.union(
    _PASSING - _ALIASING,
    _words("""
    add sub mul truediv floordiv div mod pow neg abs exp log sqrt rsqrt square softmax log_softmax batch_norm group_norm
    layer_norm instance_norm sum var std max min maximum minimum where stack eq ne lt le gt ge
    """),
)
_SHAPE = _words("size dim ndimension numel")
_SHAPE_ATTRIBUTES = _words("shape ndim dtype device layout is_cuda requires_grad")


@dataclass
class Links:
    """What a module's calls take and give, through activations, dropout, pooling, reshaping and concatenation."""

    sources: list[End] = field(default_factory=list)
    pooled: set[End] = field(default_factory=set)  # the sources that it sees as one value per channel and image
    sinks: list[End] = field(default_factory=list)
    guessed: set[End] = field(default_factory=set)  # neighbours in the order of registration, where no trace tells
    calls: int = 0
    direct: bool = True  # its sources feed it with nothing between; said of guessed sources, too
    input_read: bool = True  # others read its input too, or may: the caller, or a gradient
    overwritten: bool = True  # its output is overwritten by an operation in place, or may be
    weight_read: bool = False  # its parameters are used by other code than its own forward


def links(model: nn.Module, is_leaf: Callable[[nn.Module], bool]) -> dict[nn.Module, Links]:
    """Links of every module for which ``is_leaf`` holds, in the order of their first calls.

    The model is traced as a whole if torch.fx can trace it, else the parts that it can; what a part's edge hides is
    filled in from the order of registration and marked as ``guessed``. The model is left as it was.
    """
    with _undisturbed(model):
        graphs = _Cover(is_leaf).graphs(model)
    found: dict[nn.Module, Links] = {}
    for graph in graphs:
        graph.read_into(found)
    leaves = {m for m in model.modules() if is_leaf(m)}
    _fill_from_order(model, leaves, found)
    return found


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Tracing runs the model's Python code: in training mode, and undone afterwards."""
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]), restored(model):
        warnings.simplefilter("ignore")
        for module in model.modules():
            if not isinstance(module, torch.jit.ScriptModule):
                module.training = True
        yield


class _Tracer(fx.Tracer):
    proxy_buffer_attributes = True  # or a forward that updates a buffer would do so now

    def __init__(self, is_leaf: Callable[[nn.Module], bool], opaque: set[nn.Module]) -> None:
        super().__init__()
        self.is_leaf, self.opaque = is_leaf, opaque

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return m in self.opaque or self.is_leaf(m) or super().is_leaf_module(m, module_qualified_name)


class _Cover:
    """Traces of as large parts of a model as torch.fx can trace."""

    def __init__(self, is_leaf: Callable[[nn.Module], bool]) -> None:
        self.is_leaf = is_leaf
        self.opaque: set[nn.Module] = set()

    def graphs(self, module: nn.Module, whole: bool = True) -> list[_Graph]:
        """Of ``module`` if it can be traced, perhaps around parts that cannot; else of its parts alone."""
        if self.is_leaf(module):
            return []
        graph = self._trace(module, whole)
        if graph is not None:
            return [graph]
        known = set(self.opaque)
        parts = [graph for child in module.children() for graph in self.graphs(child, False)]
        graph = self._trace(module, whole) if self.opaque != known else None
        if graph is None:
            self.opaque.add(module)
            return parts
        inside = {m for opaque in self.opaque for m in opaque.modules()}
        return [graph, *(part for part in parts if part.root in inside)]

    def _trace(self, module: nn.Module, whole: bool) -> _Graph | None:
        tracer = _Tracer(self.is_leaf, self.opaque)
        try:
            parameters = inspect.signature(module.forward).parameters.values()
            defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
            graph = tracer.trace(module, concrete_args=defaults or None)
        except Exception:  # the model's own code, with values it does not expect: anything can happen
            return None
        return _Graph(graph, module, self.is_leaf, frozenset(self.opaque), whole)


@dataclass
class _Graph:
    """A traced part of a model. Its edges are the model's own if it is the ``whole`` model."""

    graph: fx.Graph
    root: nn.Module
    is_leaf: Callable[[nn.Module], bool]
    opaque: frozenset[nn.Module]
    whole: bool

    def read_into(self, found: dict[nn.Module, Links]) -> None:
        for node in self.graph.nodes:
            if node.op == "get_attr":
                for owner in self._owners(node) if _readers(node) else ():
                    found.setdefault(owner, Links()).weight_read = True
            elif node.op == "call_module" and self.is_leaf(module := self._module(node)):
                link = found.setdefault(module, Links())
                link.calls += 1
                sources = self._walk(_data_inputs(node), _data_inputs)
                link.sources += sources
                link.direct &= all(n.op == "call_module" and self.is_leaf(self._module(n)) for n in _data_inputs(node))
                link.pooled |= set(sources) - set(self._walk(_data_inputs(node), self._unpooled_inputs))
                link.sinks += self._walk(_readers(node), _readers)
                link.input_read = link.calls > 1 or not all(map(self._yields_new, _data_inputs(node)))
                link.overwritten = self._overwritten(node) or (link.calls > 1 and link.overwritten)

    def _owners(self, node: fx.Node) -> list[nn.Module]:
        """The layers whose parameter or buffer it is, by whatever name it is read."""
        path, _, name = str(node.target).rpartition(".")
        value = getattr(self.root.get_submodule(path), name, None)  # none where it was set by the tracer
        if value is None:
            return []
        layers = [m for m in self.root.modules() if self.is_leaf(m)]
        return [m for m in layers if any(t is value for t in (*m._parameters.values(), *m._buffers.values()))]

    def _module(self, node: fx.Node) -> nn.Module:
        return self.root.get_submodule(str(node.target))

    def _walk(self, start: Iterable[fx.Node], step: Callable[[fx.Node], Iterable[fx.Node]]) -> list[End]:
        """The ends that are reached from ``start`` by ``step``."""
        ends: dict[End, None] = {}
        seen: set[fx.Node] = set()
        todo = list(start)
        while todo:
            node = todo.pop(0)
            if not self._passes(node):
                ends[self._end(node)] = None
            elif node not in seen:
                seen.add(node)
                todo += step(node)
        return list(ends)

    def _unpooled_inputs(self, node: fx.Node) -> list[fx.Node]:
        target = type(self._module(node)) if node.op == "call_module" else _name(node)
        return [] if target in _POOLING else _data_inputs(node)

    def _passes(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            return isinstance(self._module(node), _PASSING_MODULES)
        return node.op in ("call_function", "call_method") and _name(node) in _PASSING

    def _yields_new(self, node: fx.Node) -> bool:
        """Whether its output is memory that one operation alone reads."""
        if node.op == "call_module":
            module = self._module(node)
            fresh = isinstance(module, (_ConvNd, nn.Linear)) and self.is_leaf(module)
        else:
            fresh = node.op in ("call_function", "call_method") and _name(node) in _FRESH
        return fresh and len(node.users) == 1

    def _overwritten(self, node: fx.Node) -> bool:
        readers = _readers(node)
        return any(self._writes(r, node) or (self._aliases(r) and self._overwritten(r)) for r in readers)

    def _writes(self, reader: fx.Node, node: fx.Node) -> bool:
        """Whether the reader changes the node's value in place, or may."""
        if reader.op == "output":
            return not self.whole
        if reader.op == "call_module":
            module = self._module(reader)
            return module in self.opaque or bool(getattr(module, "inplace", False))
        target: Any = reader.target
        underscored = (target if isinstance(target, str) else getattr(target, "__name__", "")).endswith("_")
        augmented = _name(reader) in _AUGMENTED and reader.args[:1] == (node,)
        return underscored or augmented or any(v is True for v in (*reader.args, reader.kwargs.get("inplace")))

    def _aliases(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            return isinstance(self._module(node), _ALIASING_MODULES)
        return node.op in ("call_function", "call_method") and _name(node) not in _NEW

    def _end(self, node: fx.Node) -> End:
        if node.op == "call_module":
            module = self._module(node)
            return UNKNOWN if module in self.opaque and any(map(self.is_leaf, module.modules())) else module
        if node.op in ("placeholder", "output"):
            return (INPUT if node.op == "placeholder" else OUTPUT) if self.whole else UNKNOWN
        return "a parameter" if node.op == "get_attr" else _name(node)


def _name(node: fx.Node) -> str:
    """``relu`` for ``F.relu``, ``torch.relu_`` and ``x.relu()`` alike."""
    target: Any = node.target
    return (target if isinstance(target, str) else getattr(target, "__name__", str(target))).rstrip("_")


def _readers(node: fx.Node) -> list[fx.Node]:
    """The nodes that take its values, not its shape."""
    return [user for user in node.users if not _is_shape(user)]


def _is_shape(node: fx.Node) -> bool:
    attribute = node.args[1] if _name(node) == "getattr" and len(node.args) > 1 else None
    return node.op.startswith("call_") and (_name(node) in _SHAPE or attribute in _SHAPE_ATTRIBUTES)


def _data_inputs(node: fx.Node) -> list[fx.Node]:
    """The nodes in the first argument: the data, not the sizes, weights or indices behind it."""
    arguments = node.args or tuple(node.kwargs.values())
    nodes: list[fx.Node] = []
    fx.map_arg(arguments[:1], nodes.append)
    return nodes


def _fill_from_order(model: nn.Module, leaves: set[nn.Module], found: dict[nn.Module, Links]) -> None:
    """Put the neighbours in the order of registration where no trace tells."""
    inner = {child for leaf in leaves for child in leaf.modules() if child is not leaf}
    order = [m for m in model.modules() if m in leaves or not (m in inner or list(m.children()))]
    order = [m for m in order if m in leaves or not isinstance(m, _PASSING_MODULES)]
    for i, module in enumerate(order):
        if module not in leaves:
            continue
        link = found.setdefault(module, Links())
        if not link.calls:
            link.sources, link.sinks = [UNKNOWN], [UNKNOWN]
        before: End = order[i - 1] if i else INPUT
        after: End = order[i + 1] if i + 1 < len(order) else OUTPUT
        link.guessed = {end for end, ends in ((before, link.sources), (after, link.sinks)) if UNKNOWN in ends}
        link.sources = [before if end is UNKNOWN else end for end in link.sources]
        link.sinks = [after if end is UNKNOWN else end for end in link.sinks]
