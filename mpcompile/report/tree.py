"""The modules of a report as a tree, in which blocks that repeat (the layers of a stack) stand once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mpcompile.report.table import number_range, unnumbered

if TYPE_CHECKING:
    from mpcompile.report.model import NodeRow

# Of each precision: nodes, bytes of results, FLOPs, seconds.
Sums = dict[str, list[float]]


@dataclass
class Branch:
    """One module, or several that are decided alike.

    Fields:
      name: the last piece of its path; of several a range, "{0-11}".
      modules: paths of the modules that the branch itself stands for.
      sums: over all rows of all these modules and of those below.
    """

    name: str
    modules: list[str]
    rows: list[NodeRow] = field(default_factory=list)
    sums: Sums = field(default_factory=dict)
    below: dict[str, Branch] = field(default_factory=dict)

    def add(self, row: NodeRow, seconds: float) -> None:
        sums = self.sums.setdefault(row.precision, [0, 0, 0, 0.0])
        for at, more in enumerate((1, row.bytes, row.flops, seconds)):
            sums[at] += more

    def to_list(self, number: Callable[[str], int]) -> list[Any]:
        """[name, modules by number, {precision: [nodes, bytes, flops, seconds]}, branches below].

        Modules that hold no node of their own have no number.
        """
        sums = {name: [int(n), int(b), int(f), float(f"{s:.3g}")] for name, (n, b, f, s) in self.sums.items()}
        modules = [at for at in map(number, self.modules) if at >= 0]
        return [self.name, modules, sums, [branch.to_list(number) for branch in self.below.values()]]


def module_tree(rows: Sequence[NodeRow], seconds: Sequence[float], modules: Sequence[str]) -> list[Any]:
    """The tree of `Branch.to_list`, whose root is the model; `modules` are the paths that numbers stand for."""
    numbers = {path: at for at, path in enumerate(modules)}
    return folded_tree(rows, seconds).to_list(lambda path: numbers.get(path, -1))


def folded_tree(rows: Sequence[NodeRow], seconds: Sequence[float]) -> Branch:
    """The modules of `rows`, which take `seconds`; the root is the model, and blocks that are decided alike are one."""
    root = Branch("(model)", [""])
    for row, taken in zip(rows, seconds, strict=True):
        at = root
        at.add(row, taken)
        for name in row.module.split(".") if row.module else ():
            path = f"{at.modules[0]}.{name}" if at.modules[0] else name
            at = at.below.setdefault(name, Branch(name, [path]))
            at.add(row, taken)
        at.rows.append(row)
    _fold(root, {})
    return root


def _fold(branch: Branch, shapes: dict[tuple[object, ...], int]) -> int:
    """Fold the numbered branches below that are decided alike; a number that two branches share when they are."""
    groups: dict[tuple[str, int], list[Branch]] = {}
    for one in branch.below.values():
        groups.setdefault(("#" if one.name.isdigit() else one.name, _fold(one, shapes)), []).append(one)
    folded = [_joined(alike) for alike in groups.values()]
    branch.below = {one.name: one for one in folded}
    own = tuple((r.phase, r.op, r.was, r.precision, r.verdict, r.decided_by, unnumbered(r.reason)) for r in branch.rows)
    key = (own, tuple((name, shape, len(alike)) for (name, shape), alike in groups.items()))
    return shapes.setdefault(key, len(shapes))


def _joined(branches: Sequence[Branch]) -> Branch:
    """One branch for all of `branches`, which are decided alike: what stands below them pairs up in order."""
    if len(branches) == 1:
        return branches[0]
    names = [one.name for one in branches]
    name = names[0] if len(set(names)) == 1 else number_range(names)
    whole = Branch(name, [path for one in branches for path in one.modules])
    for one in branches:
        for precision, sums in one.sums.items():
            total = whole.sums.get(precision, [0, 0, 0, 0.0])
            whole.sums[precision] = [a + b for a, b in zip(total, sums, strict=True)]
    for twins in zip(*(one.below.values() for one in branches), strict=True):
        joined = _joined(twins)
        whole.below[joined.name] = joined
    return whole
