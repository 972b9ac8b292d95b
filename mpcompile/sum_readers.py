"""Who reads a sum decides whether it may be rounded: sums of rows, of rounded values with weights, and of what has a range."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from mpcompile.behaviours import rounds
from mpcompile.graph import Node
from mpcompile.rules.hazards import base

if TYPE_CHECKING:
    from mpcompile.origins import Flow

# Marks a sum of rounded values with weights in `Flow.sums`.
WITH_WEIGHT = "*"
# A sum with a table of this range, in front of a norm or a product, loses no more than the table's own last bits.
SMALL = 8.0


class SumReaders:
    """The questions, asked of a flow whose origins are known."""

    def __init__(self, flow: Flow) -> None:
        self.flow = flow

    def sum(self, full: str, name: str) -> bool:
        """Whether the sum `name` may be rounded; `full` is its full operand, "" for none, or `WITH_WEIGHT`."""
        if full == WITH_WEIGHT:
            return self._all_readers(name, self._reads_on)
        return self._is_gentle(full, name) or self._is_mask(full, name)

    def _is_gentle(self, full: str, name: str) -> bool:
        small = not full or (full in self.flow.tables and max(map(abs, self.flow.ranges[full])) <= SMALL)
        return small and self._all_readers(name, self._reads_gently)

    def _reads_gently(self, reader: Node) -> bool | None:
        how = self.flow.behaviours.of(reader)
        if how == "add":
            return reader.id not in self.flow.denied and self.flow.origin.get(reader.outputs[0]) == "rounded"
        if how == "move":
            return None
        return how == "norm" or rounds(reader, how) or "dropout" in base(reader.op)

    def _reads_on(self, reader: Node) -> bool | None:
        """False for a loss, and for arithmetic whose result is full."""
        how = self.flow.behaviours.of(reader)
        if how == "move":
            return None
        looks = how in ("add", "multiply", "divide", "select", "map", "place", "compare")
        return reader.kind != "loss" and not (
            looks and any(self.flow.origin.get(name) == "full" for name in reader.outputs)
        )

    def _is_mask(self, full: str, name: str) -> bool:
        """Something that is never positive, added to scores in front of a softmax: what it rounds, the softmax forgets."""
        return bool(full) and self.flow.ranges[full][1] <= 0 and self._all_readers(name, self._is_softmax)

    def _is_softmax(self, reader: Node) -> bool | None:
        if self.flow.behaviours.of(reader) in ("move", "add") and reader.id not in self.flow.denied:
            return None
        return reader.kind == "softmax"

    def _all_readers(self, name: str, accepts: Callable[[Node], bool | None]) -> bool:
        """Whether `accepts` all who read a value; where it says None, it is asked of those who read that node."""
        waiting, seen = [name], {name}
        while waiting:
            name = waiting.pop()
            if name in self.flow.returned:
                return False
            for reader in self.flow.readers[name]:
                answer = accepts(reader)
                if answer is False:
                    return False
                if answer is None:
                    waiting += [out for out in reader.outputs if out not in seen]
                    seen.update(reader.outputs)
        return True
