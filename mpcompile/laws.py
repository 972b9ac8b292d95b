"""The laws of a precision graph, one small function each, and the verifier that runs them.

Laws 7 (running the pipeline twice changes nothing), 8 (a failed pass leaves the caller's graph alone) and 9 (same
bytes whatever the node order) speak of runs, not of one graph: the property tests hold them.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from operator import attrgetter

from mpcompile.behaviours import MOVERS, Behaviours, rounds
from mpcompile.errors import LawError
from mpcompile.formats import CASTABLE, LOW
from mpcompile.fp8 import impossible, uncast
from mpcompile.graph import CAST_OP, Node, PrecisionGraph
from mpcompile.text import print_node


@dataclass(frozen=True, slots=True)
class Breach:
    """One broken law: its code, what is wrong, and the node that breaks it ("" for the graph as a whole)."""

    code: str
    what: str
    node: str = ""
    try_: str = ""


def writes(graph: PrecisionGraph, node: Node) -> set[str]:
    """Alias groups whose storage `node` may change.

    In-place operations are named with a trailing underscore ("aten.add_.Tensor"), or return a value of the group that
    is no view of it; normalizations update the running statistics that they are given.  Where `torch.no_grad` begins or ends,
    all storage counts as written: a cast on one side of it is no cast for the other, whose gradient would be lost.
    """
    if node.op == GRADIENTS:
        return {value.alias for value in graph.values.values()} - {""}
    touched = {graph.values[name].alias for name in node.inputs} - {""}
    if not touched or node.is_cast:
        return set()
    if _IN_PLACE.search(node.op) or not node.op.startswith(_PURE):
        return touched
    if node.kind in ("view", "shape"):
        return set()
    return touched & {graph.values[name].alias for name in node.outputs}


def writers(graph: PrecisionGraph) -> dict[str, set[str]]:
    """Node id -> the alias groups it writes to, for the nodes that write to any."""
    if not any(map(_ALIAS, graph.values.values())):
        return {}
    return {node.id: found for node in graph.nodes.values() if (found := writes(graph, node))}


_ALIAS = attrgetter("alias")
# Turns gradients on or off from there on.
GRADIENTS = "builtin._set_grad_enabled"
# Custom operations may write to whatever they are given; ONNX and prims never do.
_IN_PLACE = re.compile(r"_$|_\.|[._]out\b|batch_norm|instance_norm|rrelu_with_noise")
_PURE = ("aten.", "prims.", "onnx::")


def structure(graph: PrecisionGraph) -> Iterator[Breach]:
    """Names exist and are unique, producers are right, and every value is made before it is read."""
    made = {name for name, value in graph.values.items() if not value.producer}
    for name in graph.inputs:
        if name not in made:
            yield Breach("MP410", f"graph input {name!r} is no value, or has a producer")
    get = graph.values.get
    for key, node in graph.nodes.items():
        if key != node.id or len(node.slots) != len(node.inputs):
            yield Breach("MP410", f"node {node.id!r} is filed under {key!r}, or lacks slots of its operands", node.id)
        if not made.issuperset(node.inputs):
            yield from _unmade(node, made)
        for name in node.outputs:
            value = get(name)
            if name in made or value is None or value.producer != node.id:
                yield Breach("MP410", f"{name!r} of node {node.id!r} is missing, made twice, or not its own", node.id)
            made.add(name)
    if not made.issuperset(graph.outputs) or not made.issuperset(graph.values):
        missing = [name for name in [*graph.outputs, *graph.values] if name not in made]
        yield from (Breach("MP410", f"nothing makes the value {name!r}") for name in missing)


def _unmade(node: Node, made: set[str]) -> Iterator[Breach]:
    for name in node.inputs:
        if name not in made:
            yield Breach("MP410", f"node {node.id!r} reads {name!r} before it is made", node.id)


def precision(graph: PrecisionGraph) -> Iterator[Breach]:
    """Law 1: what a node reads and gives is in the precision that it was given."""
    values = graph.values
    for node in graph.nodes.values():
        own, is_cast = node.precision, node.op == CAST_OP
        if own not in _PRECISIONS and not is_cast:
            what = f"node {node.id!r} has no precision, but {own!r}"
            yield Breach("MP401", what, node.id, "run assign first")
            continue
        for operand, name in enumerate(node.inputs if not is_cast or node.operands else ()):
            dtype = values[name].dtype
            if (
                (dtype != own or node.operands)
                and dtype in CASTABLE
                and (want := node.reads_at(operand)) not in ("any", dtype)
            ):
                yield Breach("MP401", f"node {node.id!r} reads {name!r} as {dtype}, but needs {want}", node.id)
        told = is_cast or node.out_dtype or node.results
        for output, name in enumerate(node.outputs):
            dtype = values[name].dtype
            if (told or dtype != own) and dtype in CASTABLE and (gives := node.gives_at(output)) not in ("keep", dtype):
                yield Breach("MP401", f"node {node.id!r} gives {name!r} as {dtype}, but should give {gives}", node.id)


_PRECISIONS = CASTABLE | {"keep"}


def never_cast(graph: PrecisionGraph) -> Iterator[Breach]:
    """Law 2: our casts go from one of fp32, fp16, bf16 to another one."""
    for cast in graph.casts():
        source, to = graph.values[cast.inputs[0]], cast.attrs.get("to")
        if source.dtype not in CASTABLE or to not in CASTABLE:
            yield Breach("MP402", f"cast {cast.id!r} turns {source.name!r} from {source.dtype} into {to}", cast.id)


def fresh(graph: PrecisionGraph) -> Iterator[Breach]:
    """Law 3: nobody reads a cast of storage that has been written since."""
    written: dict[str, int] = {}
    made: dict[str, tuple[str, int]] = {}
    writing = writers(graph)
    for node in graph.nodes.values() if writing else ():
        for name in node.inputs:
            alias, time = made.get(name, ("", 0))
            if written.get(alias, 0) != time:
                yield Breach("MP407", f"node {node.id!r} reads the cast {name!r}; {alias!r} was written since", node.id)
        if node.is_cast and (alias := graph.values[node.inputs[0]].alias):
            made[node.outputs[0]] = alias, written.get(alias, 0)
        for alias in writing.get(node.id, ()):
            written[alias] = written.get(alias, 0) + 1


def few_casts(graph: PrecisionGraph) -> Iterator[Breach]:
    """Law 3: one cast per value and target; storage that is written in between counts as a new value.

    Law 4: a cast of ours never reads a cast of ours.
    """
    seen: dict[tuple[str, str, str, int], str] = {}
    written: dict[str, int] = {}
    writing, casts = writers(graph), graph.casts()
    if not writing and lean(graph, casts):
        return
    for node in graph.nodes.values() if writing else casts:
        for alias in writing.get(node.id, ()) if writing else ():
            written[alias] = written.get(alias, 0) + 1
        if node.op != CAST_OP:
            continue
        source, to = graph.values[node.inputs[0]], str(node.attrs["to"])
        before = graph.nodes.get(source.producer)
        if before is not None and before.is_cast:
            yield Breach("MP404", f"cast {node.id!r} reads the cast {before.id!r}", node.id)
        times = written.get(source.alias, 0) if written else 0
        first = seen.setdefault((source.name, to, node.scope, times), node.id)
        if first != node.id:
            yield Breach("MP403", f"casts {first!r} and {node.id!r} both turn {source.name!r} into {to}", node.id)
        if source.dtype == to:
            yield Breach("MP403", f"cast {node.id!r} turns {to} into {to}", node.id)


def lean(graph: PrecisionGraph, casts: list[Node]) -> bool:
    """True when no two of `casts` turn one value into one type, none reads another one, and each has something to do.

    A quick look, which asks for nothing that is written in between.
    """
    read: defaultdict[str, list[str]] = defaultdict(list)
    for cast in casts:
        read[cast.attrs["to"]].append(cast.inputs[0])
    given, values = {cast.outputs[0] for cast in casts}, graph.values
    return not any(
        len(set(names)) < len(names) or not given.isdisjoint(names) or to in [values[name].dtype for name in names]
        for to, names in read.items()
    )


def kept_casts(graph: PrecisionGraph, original: PrecisionGraph) -> Iterator[Breach]:
    """Law 4: a cast that the user wrote is still there, with its rounding."""
    for node in original.nodes.values():
        if node.is_cast or not node.out_dtype:
            continue
        now = graph.nodes.get(node.id)
        if now is None or now.out_dtype != node.out_dtype:
            yield Breach("MP404", f"the user's cast {node.id!r} to {node.out_dtype} is gone")


def same_ends(graph: PrecisionGraph, original: PrecisionGraph) -> Iterator[Breach]:
    """Law 5: the same inputs and outputs in the same order; an output may be a cast of the original one."""
    before = [(name, original.values[name].dtype) for name in original.inputs]
    now = [(name, graph.values[name].dtype) for name in graph.inputs]
    if before != now:
        yield Breach("MP405", f"the inputs were {before} and are {now}")
    old, new = [uncast(original, n) for n in original.outputs], [uncast(graph, n) for n in graph.outputs]
    if old != new:
        yield Breach("MP405", f"the outputs were {old} and are {new}")


def output_dtypes(graph: PrecisionGraph, output: str) -> Iterator[Breach]:
    """Law 5: computed floating outputs have dtype `output`, unless the user wrote a cast there."""
    for name in graph.outputs:
        value, node = graph.values[name], graph.producer(name)
        if node is None or not value.castable or value.dtype == output or node.out_dtype:
            continue
        yield Breach("MP405", f"output {name!r} is {value.dtype}; the policy says {output}", node.id)


def fp32_arithmetic(graph: PrecisionGraph) -> Iterator[Breach]:
    """Law 6: optimizer nodes are never low but where the optimizer's own code says so (Muon), or the caller (sums of
    microbatches under grads=low); a scalar loss is FP32 unless an override said otherwise.
    """
    for node in graph.nodes.values():
        if node.precision not in LOW or node.op == CAST_OP:
            continue
        if node.phase == "optimizer" and node.decided_by not in ("user-cast", "override"):
            yield Breach("MP406", f"optimizer node {node.id!r} runs in {node.precision}", node.id)
        if node.kind == "loss" and node.decided_by != "override":
            yield Breach("MP406", f"loss {node.id!r} runs in {node.precision}", node.id)


def one_precision(graph: PrecisionGraph) -> Iterator[Breach]:
    """Values that share written storage, and nodes of a group, are in one precision."""
    storage: dict[str, str] = {}
    for value in graph.values.values():
        if value.alias and value.castable and storage.setdefault(value.alias, value.dtype) != value.dtype:
            yield Breach("MP411", f"{value.name!r} is {value.dtype}, its storage {value.alias!r} "
                                  f"is {storage[value.alias]}", value.producer)  # fmt: skip
    groups: dict[str, str] = {}
    for node in graph.nodes.values():
        if node.group and node.precision != "keep" and groups.setdefault(node.group, node.precision) != node.precision:
            yield Breach("MP411", f"node {node.id!r} runs in {node.precision}, its group {node.group!r} "
                                  f"in {groups[node.group]}", node.id)  # fmt: skip


def full_values(graph: PrecisionGraph) -> Iterator[Breach]:
    """Law 10: a full value is read low by what rounds it anyway, or by a rule with evidence; stored low by what only moves it.

    It needs the origins that the origins pass wrote down, and says nothing of a graph without any.
    """
    values = graph.values
    full = {name for name, value in values.items() if value.origin == "full"}
    if not full:
        return
    behaviours = Behaviours(graph.header.get("source", "fx"))
    # A cast of ours has no origin of its own: it is what it casts.
    roots = {cast.outputs[0]: uncast(graph, cast.inputs[0]) for cast in graph.casts()}
    moved: dict[str, Node] = {}
    for node in graph.nodes.values():
        if node.op == CAST_OP or node.precision not in LOW or node.kind == "cast" or node.decided_by == "user-cast":
            continue
        how = behaviours.of(node)
        if rounds(node, how):
            continue
        low = {name for name in (*node.inputs, *node.outputs) if values[name].dtype in LOW}
        stored = [name for name in node.outputs if name in full and name in low and not node.out_dtype]
        read = [roots.get(name, name) for slot, name in zip(node.slots, node.inputs, strict=True)
                if name in low and slot not in node.operands and roots.get(name, name) in full]  # fmt: skip
        if how in MOVERS:
            moved.update((name, node) for name in stored)
        elif stored or (read and how not in ("add", "multiply", "place")):
            what = f"stores {stored[0]!r}" if stored else f"reads {read[0]!r}"
            yield Breach("MP409", f"node {node.id!r} {what} in {node.precision}, and its digits count", node.id)
    for node in graph.nodes.values() if moved else ():
        name = node.inputs[0] if node.op == CAST_OP and node.attrs["to"] == "fp32" else ""
        if name in moved:
            yield Breach("MP409", f"{name!r}, which {moved[name].id!r} moves low, is needed in FP32", node.id)


def fp8_reads(graph: PrecisionGraph) -> Iterator[Breach]:
    """Law 10: FP8 is a form in which a BF16 linear layer reads rounded values and weights."""
    for node in graph.nodes.values():
        for step in node.fp8:
            why = "it is " + node.precision if node.precision != "bf16" else impossible(graph, node, step)
            if why:
                yield Breach("MP409", f"node {node.id!r} reads FP8 for its {step}: {why}", node.id)


# What can hold from which stage on.  A stage has its own laws and those before it.
STAGES: dict[str, tuple[Callable[[PrecisionGraph], Iterator[Breach]], ...]] = {
    "structure": (structure,),
    "assigned": (fp32_arithmetic, one_precision),
    "cast": (precision, never_cast, fresh, full_values, fp8_reads),
    "simplified": (few_casts,),
}


def breaches(graph: PrecisionGraph, original: PrecisionGraph | None = None, *,
             stage: str = "simplified", output: str = "keep") -> Iterator[Breach]:  # fmt: skip
    """Every broken law, lazily.  Nothing further is looked at in a graph that is not well formed.

    Args:
      original: the graph before the pipeline, for the laws that compare.
      stage: "structure", "assigned", "cast" or "simplified": how far the pipeline has come.
      output: dtype of floating outputs ("fp32", "fp16", "bf16", or "keep").
    """
    for name, laws in STAGES.items():
        found = False
        for law in laws:
            for breach in law(graph):
                found = True
                yield breach
        if name == stage or (found and name == "structure"):
            break
    if original is not None and not found:
        yield from kept_casts(graph, original)
        yield from same_ends(graph, original)
    if output != "keep" and stage in ("cast", "simplified") and not found:
        yield from output_dtypes(graph, output)


def verify(graph: PrecisionGraph, original: PrecisionGraph | None = None, *,
           stage: str = "simplified", output: str = "keep") -> None:  # fmt: skip
    """Check the laws (see `breaches`); linear in the size of the graph.

    Raises:
      LawError: MP4xx, for the first broken law, with the line of the node in the text form.
    """
    first = next(breaches(graph, original, stage=stage, output=output), None)
    if first is None:
        return
    node = graph.nodes.get(first.node)
    error = LawError(first.code, first.what, where=_where(node), try_=first.try_)
    if node is not None:
        error.add_note(f"  {print_node(graph, node)}\n  ^ {first.what}")
    raise error


def _where(node: Node | None) -> str:
    if node is None:
        return ""
    return ", ".join(part for part in (f"node {node.id}", node.module and f"module {node.module}", node.source) if part)
