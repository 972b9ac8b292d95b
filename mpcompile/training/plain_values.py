"""Python values that a graph was made of: attributes of modules, fields of their configurations, what a loss closes over.

A trace runs Python once, so each such value is a constant of its graph.  `PlainValues` notes which attributes of modules
a capture reads, adds what the loss function and the modules' own functions name (closures, defaults, globals), and gives
every state of them a number, which is part of a graph's signature.  As long as nothing changed that takes a fixed number
of calls of C code, which compare objects by identity.
"""

from __future__ import annotations

import argparse
import contextlib
import enum
import functools
import operator
import sys
import types
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, repeat
from typing import Any, cast

import torch
from torch import Tensor, nn

from mpcompile.errors import TrainingError
from mpcompile.torch_internals.modules import ABSENT, WRITTEN, module_reads, tables_of

# So many states of the values are compiled for before a word is said.
MANY_STATES = 8
# Larger containers, and what lies deeper, are compared by identity alone.
_LARGEST, _DEEPEST = 256, 5
_MISSING = ABSENT
_ATOMS = (str, bytes, int, bool, type(None), enum.Enum, torch.dtype, torch.device, torch.layout, type, slice, range)
_SEQUENCES, _RECORDS = (list, set, frozenset, deque), (types.SimpleNamespace, argparse.Namespace)
# What belongs to these is no configuration: its fields move without a meaning for the forward.
_STRANGERS = sys.stdlib_module_names | {"torch", "numpy", "lightning", "pytorch_lightning", "lightning_fabric",
                                        "accelerate", "mpcompile", "tqdm", "wandb"}  # fmt: skip
_OWN = frozenset(vars(nn.Module())) | frozenset(vars(nn.Module))


class Walk:
    """What was met on the way through values: the places to compare by identity, and their signature."""

    def __init__(self, moved: set[Any]) -> None:
        self._moved = moved
        self.tables, self.keys, self.names = list[dict[Any, Any]](), list[Any](), list[str]()
        self.owners, self.attributes = list[Any](), list[str]()
        self.sized: list[Any] = []
        self.sequences: list[Any] = []
        self.alive: list[Any] = []
        self._places: set[Any] = set()

    def of_table(
        self, table: dict[Any, Any], key: Any, name: str, above: tuple[int, ...], *, whole: bool = False, **how: Any
    ) -> Any:
        """The signature of an entry; `whole`: by its identity alone."""
        if (id(table), key) in self._moved:
            return None
        if (id(table), key) not in self._places:
            self._places.add((id(table), key))
            self.tables.append(table)
            self.keys.append(key)
            self.names.append(name)
        value = dict.get(table, key, _MISSING)
        return self._by_identity(value) if whole else self.of(value, name, above, **how)

    def of_attribute(
        self, owner: Any, key: str, name: str, above: tuple[int, ...], *, whole: bool = False, **how: Any
    ) -> Any:
        """The signature of an attribute; `whole`: by its identity alone."""
        if (id(owner), key) not in self._places:
            self._places.add((id(owner), key))
            self.owners.append(owner)
            self.attributes.append(key)
        value = getattr(owner, key, _MISSING)
        return self._by_identity(value) if whole else self.of(value, name, above, **how)

    def of(self, value: Any, name: str, above: tuple[int, ...], only: frozenset[str] | None = None) -> Any:
        """The signature of a value: 1, 1.0 and True are three, and so are 0.0 and -0.0.

        Args:
          only: names that are read of an object; all of them without it.
        """
        if isinstance(value, (float, complex)):
            return type(value), repr(value)
        if isinstance(value, _ATOMS):
            return type(value), value
        if id(value) in above or len(above) > _DEEPEST:
            return self._by_identity(value)
        inside = (*above, id(value))
        if isinstance(value, tuple):
            return type(value), tuple(self.of(v, f"{name}[{i}]", inside, only) for i, v in enumerate(value))
        if isinstance(value, _SEQUENCES):
            return self._sequence(value, name, inside, only)
        if isinstance(value, dict):
            return self._table(value, list(dict.keys(value)), f"{name}[{{!r}}]", inside, only)
        if isinstance(value, (types.FunctionType, types.MethodType, functools.partial)):
            return self.of_callable(value, name, inside)
        if is_stranger(value) or not isinstance(getattr(value, "__dict__", None), dict):
            return self._by_identity(value)
        fields = [k for k in vars(value) if only is None or k in only]
        return type(value), self._table(vars(value), fields, f"{name}.{{}}", inside, None)

    def _by_identity(self, value: Any) -> Any:
        self.alive.append(value)
        return "object", id(value)

    def _sequence(self, value: Any, name: str, above: tuple[int, ...], only: Any) -> Any:
        self.sized.append(value)
        if len(value) > _LARGEST:
            return type(value), self._by_identity(value), len(value)
        self.sequences.append(value)
        return type(value), tuple(self.of(v, f"{name}[{i}]", above, only) for i, v in enumerate(value))

    def _table(self, table: dict[Any, Any], keys: list[Any], form: str, above: tuple[int, ...], only: Any) -> Any:
        if len(keys) > _LARGEST:
            return self._by_identity(table)
        if len(keys) == len(table):
            self.sized.append(table)
        return tuple((repr(k), self.of_table(table, k, form.format(k), above, only=only)) for k in keys)

    def of_callable(self, call: Any, name: str, above: tuple[int, ...] = ()) -> Any:
        """What a function, a method or a partial of them reads beside its arguments."""
        if isinstance(call, functools.partial):
            parts = (self.of(part, name, above) for part in (call.func, call.args, call.keywords))
            return "partial", tuple(parts)
        if isinstance(call, types.MethodType):
            if isinstance(call.__self__, nn.Module):
                return "method", id(call.__self__), self.of_functions(functions_of(call), name, above)
            owner = self.of(call.__self__, f"{name}.__self__", above, read_names(call))
            return "method", owner, self.of_functions(functions_of(call), name, above)
        if not isinstance(call, types.FunctionType) or is_stranger(call):
            return self._by_identity(call)
        return self.of_functions(functions_of(call), name, above)

    def of_functions(self, functions: list[types.FunctionType], name: str, above: tuple[int, ...]) -> Any:
        only = frozenset(chain.from_iterable(names_of(f.__code__) for f in functions))
        return tuple(self._function(f, name, above, only) for f in functions)

    def _function(self, f: types.FunctionType, name: str, above: tuple[int, ...], only: frozenset[str]) -> Any:
        named, known = [self.of_attribute(f, "__code__", name, above)], f.__globals__
        named.append(self.of_attribute(f, "__defaults__", f"a default of {name}", above, only=only))
        named.append(self.of_attribute(f, "__kwdefaults__", f"a default of {name}", above, only=only))
        for cell, free in zip(f.__closure__ or (), f.__code__.co_freevars, strict=True):
            with contextlib.suppress(ValueError):  # an empty cell
                whole = isinstance(cell.cell_contents, types.FunctionType)
                named.append(self.of_attribute(cell, "cell_contents", free, above, whole=whole, only=only))
        for key in sorted(names_of(f.__code__) & known.keys()):
            value = known[key]
            if isinstance(value, types.ModuleType):
                named += self._of_module(value, key, above, only)
            else:
                # What a function calls by name is read with it; here that the name still stands for it.
                whole = callable(value) and not isinstance(value, functools.partial)
                named.append(self.of_table(known, key, key, above, whole=whole, only=only))
                named += self._of_class(value, key, above, only)
        return tuple(named)

    def _of_class(self, cls: Any, name: str, above: tuple[int, ...], only: frozenset[str]) -> list[Any]:
        """What is read of a class that a function names: its static methods, and its values."""
        if not isinstance(cls, type) or is_stranger(cls) or issubclass(cls, (nn.Module, enum.Enum)):
            return []
        held = {key: value for one in reversed(cls.__mro__) if not is_stranger(one) for key, value in vars(one).items()}
        read = (key for key in sorted(only & held.keys()) if key not in _OWN and _is_plain(held[key]))
        return [self.of_attribute(cls, key, f"{name}.{key}", above, only=only) for key in read]

    def _of_module(
        self, module: types.ModuleType, name: str, above: tuple[int, ...], only: frozenset[str]
    ) -> list[Any]:
        if module.__name__.partition(".")[0] in _STRANGERS:
            return []
        held = vars(module)
        keys = sorted(
            k for k in only & held.keys() if callable(held[k]) or isinstance(held[k], (float, complex, *_ATOMS))
        )
        return [self.of_table(held, k, f"{name}.{k}", above, whole=callable(held[k])) for k in keys]


def _of_module(module: nn.Module, walk: Walk) -> Any:
    """The signature of a module that is in nobody's tables: its tensors, its children, its mode."""
    own, tables = vars(module), tables_of(module)
    walk.sized.extend(tables)
    places = [(own, "training"), (own, "forward"), *((table, key) for table in tables for key in table)]
    return tuple(walk.of_table(table, key, f"{type(module).__name__}.{key}", (), whole=True) for table, key in places)


class PlainValues:
    """The values that the graphs of one step were made of.

    Args:
      loss_fn: the loss; None, or a module, has nothing beside its attributes.
      known: gives the modules whose tables someone else compares; of others, which a module holds in a list or apart from
        its tables, all that is read is compared here.
    """

    def __init__(self, loss_fn: Callable[..., Any] | None, known: Callable[[], Sequence[nn.Module]] = tuple) -> None:
        self._loss_fn, self._known = loss_fn, known
        self.clear()

    def clear(self) -> None:
        """Nothing was compiled yet."""
        self._roots: dict[Any, Callable[[Walk], Any]] = {}
        self._moved: set[Any] = set()
        self._states: list[dict[Any, Any]] = []
        self._alive: dict[int, Any] = {}
        self._said: set[Any] = set()
        loss_fn = self._loss_fn
        if loss_fn is not None and not isinstance(loss_fn, nn.Module):
            plain = isinstance(loss_fn, (types.FunctionType, types.MethodType, functools.partial))
            call: Any = loss_fn if plain else cast(Any, loss_fn).__call__
            self._roots["loss_fn"] = lambda walk: walk.of(call, "loss_fn", ())
        self._look()

    def number(self) -> int:
        """A number for what the values are now."""
        if not _same(self._fetch(), self._held):
            self._look()
        return self._number

    @contextlib.contextmanager
    def capturing(self) -> Iterator[None]:
        """Note what a capture reads. What the capture itself changes is compared no more, and MP539 says so."""
        with module_reads() as (found, written):
            yield
        self._leave_out(found, written)
        known = set(map(id, self._known()))
        for owner, name, value in found.values():
            self._note_functions(type(owner))
            if known and id(owner) not in known:
                self._roots.setdefault((id(owner), "its tables"), functools.partial(_of_module, owner))
            self._note(owner, name, value)
        self._alive |= {id(owner): owner for owner, _, _ in found.values()}
        self._states[self._number].update(self._walk())

    def _note(self, owner: nn.Module, name: str, value: Any) -> None:
        """An attribute of a module that was read, or asked for in vain."""
        cls = type(owner)
        if name in _OWN or name.startswith("__") or cls.__module__.partition(".")[0] == "mpcompile" or value is WRITTEN:
            return
        if any(name in table for table in tables_of(owner)):
            return
        at, path = vars(owner), f"{cls.__name__}.{name}"
        self._roots.setdefault((id(owner), name), lambda walk: walk.of_table(at, name, path, ()))
        held = getattr(cls, name, _MISSING)
        if name in at or (callable(held) and is_stranger(held)):
            return
        whole = not isinstance(held, (float, complex, *_ATOMS, tuple, list, dict))
        self._roots.setdefault((cls, name), lambda walk: walk.of_attribute(cls, name, path, (), whole=whole))

    def _note_functions(self, cls: type) -> None:
        forward, plain = getattr(cls, "forward", None), cls not in self._roots
        if plain and isinstance(forward, types.FunctionType) and not is_stranger(forward):
            self._roots[cls] = lambda walk: walk.of_functions(functions_of(forward, cls), f"{cls.__name__}.forward", ())

    def _leave_out(self, found: dict[Any, Any], written: dict[Any, Any]) -> None:
        """Places whose value a capture changed: the next call would find another value each time."""
        walk = self._now
        # Export puts back what it saw assigned.
        moved = [
            (f"{type(owner).__name__}.{key}", found[id(owner), key][2], new) for owner, key, new in written.values()
        ]
        fetched = list(map(dict.get, walk.tables, walk.keys, repeat(_MISSING)))
        for table, key, name, old, new in zip(walk.tables, walk.keys, walk.names, self._held, fetched, strict=False):
            if not _alike(old, new):
                self._moved.add((id(table), key))
                moved.append((name, old, new))
        watched = set(zip(map(id, walk.tables), walk.keys, strict=True))
        for owner, key, old in found.values():
            place, new = (id(vars(owner)), key), vars(owner).get(key, _MISSING)
            if place not in watched and key in vars(owner) and key not in _OWN and not _alike(old, new):
                self._moved.add(place)
                moved.append((f"{type(owner).__name__}.{key}", old, new))
        others = map(getattr, walk.owners, walk.attributes, repeat(_MISSING))
        numbers = zip(walk.attributes, self._held[len(walk.tables) :], others, strict=False)
        moved += [(name, old, new) for name, old, new in numbers if not _alike(old, new)]
        for name, old, new in moved:
            if isinstance(old, (int, float)) and isinstance(new, (int, float)) and not _alike(old, new):
                self._say_of_counter(name, old, new)

    def _say_of_counter(self, name: str, old: Any, new: Any) -> None:
        if name not in self._said:
            self._said.add(name)
            _warn("MP539", f"the forward changes {name}, which it reads: {old!r} became {new!r}",
                  why="Python runs once for each graph: it stands still in between, and is a constant of the graph",
                  try_="make it a buffer and count in place, or pass it as a tensor")  # fmt: skip

    # --------------------------------------------------------------------------------------------------------- states

    def _walk(self) -> dict[Any, Any]:
        walk = self._now = Walk(self._moved)
        signatures = {key: root(walk) for key, root in self._roots.items()}
        self._alive |= {id(one): one for one in walk.alive}
        self._held = self._fetch()
        return signatures

    def _fetch(self) -> list[Any]:
        walk = self._now
        return [
            *map(dict.get, walk.tables, walk.keys, repeat(_MISSING)),
            *map(getattr, walk.owners, walk.attributes, repeat(_MISSING)),
            *map(len, walk.sized),
            *chain.from_iterable(walk.sequences),
        ]

    def _look(self) -> None:
        """Find the state that the values are in, or begin one. What a state does not name, its graphs never read."""
        now = self._walk()
        for number, state in enumerate(self._states):
            if all(now.get(key) == sign for key, sign in state.items()):
                state.update(now)
                self._number = number
                return
        self._number = len(self._states)
        self._states.append(now)
        if len(self._states) == MANY_STATES:
            self._warn_of_states()

    def _warn_of_states(self) -> None:
        last, before = self._states[-1], self._states[-2]
        other = [key for key in last if before.get(key) != last[key]]
        names = [key if isinstance(key, str) else key[1] if isinstance(key, tuple) else str(key) for key in other]
        _warn("MP533", f"the step was compiled for {MANY_STATES} states of the Python values that it reads",
              why=f"the last to change: {', '.join(names):.200}",
              try_="a number that moves: pass it as a tensor argument, or make it a buffer")  # fmt: skip


def _same(now: list[Any], before: list[Any]) -> bool:
    return len(now) == len(before) and all(map(operator.is_, now, before))


def _alike(old: Any, new: Any) -> bool:
    return old is new or (
        type(old) is type(new) and isinstance(old, (float, *_ATOMS, tuple)) and repr(old) == repr(new)
    )


def _warn(code: str, message: str, why: str, try_: str) -> None:
    warnings.warn(str(TrainingError(code, message, why=why, try_=try_)), stacklevel=6)


def is_stranger(value: Any) -> bool:
    """A function or an object of a package whose values are no configuration."""
    if isinstance(value, _RECORDS):
        return False
    place = getattr(value, "__module__", None) if callable(value) else type(value).__module__
    return isinstance(value, (Tensor, nn.Module)) or str(place or "torch").partition(".")[0] in _STRANGERS


def _is_plain(held: Any) -> bool:
    """What a class holds, where reading it gives the same object each time."""
    return isinstance(held, (staticmethod, types.FunctionType)) or not hasattr(type(held), "__get__")


def names_of(code: types.CodeType) -> set[str]:
    """The names in a function's code, and in those that it defines."""
    inner = (names_of(c) for c in code.co_consts if isinstance(c, types.CodeType))
    return set(code.co_names).union(*inner)


def _classes_of(cls: type) -> list[type]:
    return [c for c in cls.__mro__ if c.__module__.partition(".")[0] not in _STRANGERS]


def functions_of(call: Any, cls: type | None = None) -> list[types.FunctionType]:
    """A function, and those that it calls by a name, of its module or of its object's class."""
    found: dict[Any, types.FunctionType] = {}
    left: list[Any] = [getattr(call, "__func__", call)]
    classes = _classes_of(cls or type(getattr(call, "__self__", None)))
    while left and len(found) < _LARGEST:
        f = left.pop()
        if not isinstance(f, types.FunctionType) or is_stranger(f) or f in found:
            continue
        found[f] = f
        names = names_of(f.__code__)
        met = [f.__globals__[n] for n in names & f.__globals__.keys()]
        with contextlib.suppress(ValueError):  # an empty cell
            met += [cell.cell_contents for cell in f.__closure__ or ()]
        left += met
        classes += chain.from_iterable(
            _classes_of(type(one)) for one in met if not callable(one) or not is_stranger(one)
        )
        left += [vars(c)[n] for c in dict.fromkeys(classes) for n in (names | {"__call__"}) & vars(c).keys()]
    return list(found)


def read_names(call: Any) -> frozenset[str]:
    """All names in a function and in those that it calls by a name."""
    return frozenset(chain.from_iterable(names_of(f.__code__) for f in functions_of(call)))


__all__ = ["PlainValues"]
