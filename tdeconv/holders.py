"""What a model holds besides its registered modules: Python lists of layers, caches, helper objects, bound methods.

A model's code reaches its layers by these too, so a layer that is replaced has to be replaced there as well; and a
forward that is traced leaves its marks there, which have to be taken back.
"""

from __future__ import annotations

import functools
import gc
import weakref
from collections import OrderedDict, deque
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from types import CodeType, FrameType, FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

_MUTABLE = (OrderedDict, dict, list, set, deque)
_IMMUTABLE = (tuple, frozenset, functools.partial)
# Nothing of a model lies behind these; behind a Python module or a frame lies all of Python.
_ENDS = (str, bytes, int, float, complex, type(None), Tensor, torch.jit.ScriptModule, ModuleType, FrameType, CodeType)
# The names that the methods have which call a layer.
_CALLS = ("forward", "_wrapped_call_impl", "_call_impl")
# Bits of a class's flags: those of classes that Python code makes, and those of most that are written in C.
_HEAP_TYPE, _IMMUTABLE_TYPE = 1 << 9, 1 << 8


def held_fast(model: nn.Module, layers: Collection[nn.Module]) -> dict[nn.Module, str]:
    """The layers that are also held where :func:`replace` cannot replace them, and what holds them there."""
    found = [held for held in _reached(model) if held.holder and _is(held.item, nn.Module)]
    return {held.item: held.holder for held in found if held.item in layers}


def replace(model: nn.Module, new: Mapping[nn.Module, nn.Module]) -> None:
    """Put the new layers wherever the model, or one of them, reaches the old ones: in ``_modules`` as in any list."""
    for item in [held.item for held in _reached(model, *new.values()) if held.is_writable]:
        _write(item, [_replaced(value, new) for value in _read(item)])


def carry_over(old: nn.Module, new: nn.Module) -> None:
    """Give the new layer the attributes that it lacks: what a model hangs on its layers, it reads there again."""
    for name, value in vars(old).items():
        if not hasattr(new, name):
            vars(new)[name] = value


def held_calls(model: nn.Module, layers: Collection[nn.Module]) -> list[MethodType]:
    """The methods by which the model calls one of the layers, where it holds these: ``self.op = self.conv.forward``."""
    methods = [held.item for held in _reached(model) if type(held.item) is MethodType and _is_made_anew(held.item)]
    return [method for method in methods if _is(method.__self__, nn.Module) and method.__self__ in layers]


@contextmanager
def restored(model: nn.Module) -> Iterator[None]:
    """Take back, at the end, what was changed meanwhile in all that the model reaches, and in any tensor.

    That is: attributes, those of the model's own classes too, and the contents of lists, dicts, sets and deques. What
    Python code changes elsewhere stays changed: global variables, files, arrays of numpy, iterators and random
    generators of its own.
    """
    saved = [(held.item, _read(held.item)) for held in _reached(model) if held.is_writable or _is(held.item, type)]
    try:
        with _TensorsRestored():
            yield
    finally:
        for item, values in saved:
            _write(item, values)


def _is(item: Any, kinds: type | tuple[type, ...]) -> bool:
    """``isinstance``, without asking a proxy for the class of what it stands for."""
    return issubclass(type(item), kinds)


class _Held(NamedTuple):
    item: Any
    holder: str  # what holds it where it cannot be exchanged for another; empty where it can
    sealed: bool  # inside an object of a class written in C, which may rely on its containing just this

    @property
    def is_writable(self) -> bool:
        return _is(self.item, _MUTABLE) and not self.sealed


def _reached(*roots: nn.Module) -> Iterator[_Held]:
    """Every object that can be reached; once for each of the ways in which it is held."""
    todo = [_Held(root, "", False) for root in roots]
    seen: dict[tuple[int, bool, bool], Any] = {}  # the objects too: an id is one object's only as long as that lives
    while todo:
        held = todo.pop()
        item, holder, sealed = held
        key = id(item), holder != "", sealed
        if key in seen:
            continue
        seen[key] = item
        yield held
        if (attributes := _attributes(item)) is not None:
            todo.append(_Held(attributes, "", False))
        if _is(item, _MUTABLE):
            holder = holder if sealed else ""
        elif not _is_made_anew(item):
            holder, sealed = _name(item), _is_sealed(item)
        todo += [_Held(inner, holder, sealed) for inner in _referents(item) if _is_of_a_model(inner)]


def _is_of_a_model(item: Any) -> bool:
    """Of classes the modules' own alone, and none of torch's; of other objects all but those that end the search."""
    if _is(item, type):
        return issubclass(item, nn.Module) and item.__module__.partition(".")[0] != "torch"
    return not _is(item, _ENDS)


def _attributes(item: Any) -> dict[str, Any] | None:
    """Its ``__dict__`` if that can be written to; no ``__getattr__`` of its own is asked."""
    try:
        attributes = object.__getattribute__(item, "__dict__")
    except AttributeError:
        return None
    return attributes if isinstance(attributes, dict) else None


def _referents(item: Any) -> list[Any]:
    """What it holds besides its attributes."""
    if _is(item, FunctionType):  # without its global variables
        return [*gc.get_referents(*(item.__closure__ or ())), item.__defaults__, item.__kwdefaults__]
    if _is(item, weakref.ref):
        return [item()]
    if _is(item, type):
        return [*vars(item).values(), *item.__bases__]
    attributes = _attributes(item) or {}
    besides = {id(attributes), *map(id, attributes.values())}  # as which Python gives them, or their values alone
    return [inner for inner in gc.get_referents(item) if id(inner) not in besides]


def _is_made_anew(item: Any) -> bool:
    """Whether another can be made of other contents, so that these are held as fast as it is itself."""
    if type(item) is MethodType:
        return item.__name__ in _CALLS and getattr(type(item.__self__), item.__name__, None) is item.__func__
    return type(item) in _IMMUTABLE or _is_named_tuple(item)


def _is_sealed(item: Any) -> bool:
    """Whether its class is no class of Python's, whose attributes are all that it has."""
    if _is(item, (FunctionType, MethodType, weakref.ref, type)):
        return False
    return type(item).__flags__ & (_HEAP_TYPE | _IMMUTABLE_TYPE) != _HEAP_TYPE


def _is_named_tuple(item: Any) -> bool:
    return _is(item, tuple) and hasattr(item, "_make")


def _name(item: Any) -> str:
    if _is(item, weakref.ref):
        return "a weak reference"
    name = item.__qualname__ if type(item) in (FunctionType, MethodType, type) else ""
    return f"a {type(item).__name__} {name}".rstrip()


def _replaced(value: Any, new: Mapping[nn.Module, nn.Module]) -> Any:
    """The new layer for an old one; for an immutable object that holds old ones, one that holds the new ones."""
    if _is(value, nn.Module):
        return new.get(value, value)
    if not _is_made_anew(value):
        return value
    if type(value) is MethodType:
        owner = _replaced(value.__self__, new)
        return value if owner is value.__self__ else getattr(owner, value.__name__)
    call = type(value) is functools.partial
    old = [value.func, *value.args, *value.keywords.values()] if call else list(value)
    parts = [_replaced(part, new) for part in old]
    if _same(parts, old):
        return value
    if call:
        func, rest, n = parts[0], parts[1:], len(value.args)
        return functools.partial(func, *rest[:n], **dict(zip(value.keywords, rest[n:], strict=True)))
    return value._make(parts) if _is_named_tuple(value) else type(value)(parts)


def _same(some: list[Any], others: list[Any]) -> bool:
    return len(some) == len(others) and all(a is b for a, b in zip(some, others, strict=True))


def _read(item: Any) -> list[Any]:
    """What a mutable object contains: of a dict, or a class, all keys and then all values."""
    if _is(item, type):
        return [*vars(item).keys(), *vars(item).values()]
    base = _base(item)
    return [*base.keys(item), *base.values(item)] if _is(item, dict) else list(base.__iter__(item))


def _write(item: Any, contents: list[Any]) -> None:
    """Make it contain this; it is not touched if it does so already."""
    if _same(_read(item), contents):
        return
    half = len(contents) // 2
    pairs = zip(contents[:half], contents[half:], strict=False)
    if _is(item, type):
        _write_class(item, dict(pairs))
        return
    base = _base(item)
    base.clear(item)
    if _is(item, dict):
        for key, value in pairs:
            base.__setitem__(item, key, value)
    elif _is(item, set):
        base.update(item, contents)
    else:
        base.extend(item, contents)


def _base(item: Any) -> Any:
    """The class whose methods read and write a container as it is, whatever a subclass makes of them."""
    return next(base for base in _MUTABLE if _is(item, base))


def _write_class(item: type, attributes: dict[str, Any]) -> None:
    now = dict(vars(item))
    for name in now.keys() - attributes.keys():
        type.__delattr__(item, name)
    for name, value in attributes.items():
        if name not in now or now[name] is not value:
            type.__setattr__(item, name, value)


class _TensorsRestored(TorchDispatchMode):
    """Copies what an operation in place is about to overwrite, and puts it back at the end."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._before: list[tuple[Tensor, Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for i, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                value = args[i] if i < len(args) else kwargs.get(argument.name)
                written = value if isinstance(value, (list, tuple)) else [value]
                self._before += [(t, t.clone()) for t in written if isinstance(t, Tensor)]
        return func(*args, **kwargs)

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)  # type: ignore[no-untyped-call]
        with torch.inference_mode():  # which may write to tensors of its own, and to all others
            for tensor, before in reversed(self._before):
                if tensor.shape != before.shape:
                    tensor.resize_(before.shape)
                tensor.copy_(before)
