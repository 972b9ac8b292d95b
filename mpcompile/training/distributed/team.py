"""What a step among several ranks does besides: how it averages, and what it compares once."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mpcompile.errors import TrainingError
from mpcompile.training.distributed.agreement import Facts, agree, tensors_as_facts
from mpcompile.training.distributed.ranks import Ranks, refuse_alone
from mpcompile.training.distributed.reduce import Reducer
from mpcompile.training.distributed.scatter import Scatterer

# (parameter's name, dtype) of each gradient, in order.
Sent = tuple[tuple[str, torch.dtype], ...]


# Words of gloo's and NCCL's errors, which are plain ones of the runtime.
_OF_COLLECTIVES = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer")


class Team:
    """The ranks of one step; of a process alone there are none, and nothing here does anything.

    Args:
      ranks: who they are.
      low: gradients that are low travel so.
      accumulate: microbatches of a window; in one of several the sums are averaged, at its end.
      shared: each rank updates a share, and the averages are handed out in shares.
      full: the low type, where each rank holds a share of the weights too; shares are then handed out of each microbatch.

    Fields:
      in_graph, of_sums: what averages the gradients of a batch, and the sums of a window; one of the two at most.
      scatterer: the one of the two that hands out shares.
    """

    def __init__(
        self, ranks: Ranks | None, low: bool, accumulate: int, shared: bool, full: torch.dtype | None = None
    ) -> None:
        self._told, self.size = ranks, ranks.size if ranks is not None else 1
        self.ranks = ranks = ranks if self.size > 1 else None
        self.scatterer = Scatterer(ranks, low, full=full) if ranks is not None and shared else None
        reducer = self.scatterer or (Reducer(ranks, low) if ranks is not None else None)
        self.in_graph = reducer if accumulate == 1 or full is not None else None
        self.of_sums = reducer if self.in_graph is None else None
        self._agreed: Sent | None = None
        self._averages: tuple[Sent, Callable[[Sequence[Tensor]], Sequence[Tensor]]] | None = None

    def check(self) -> None:
        """Refuse to train one of several ranks apart from the others.

        Raises:
          TrainingError: MP535, MP547.
        """
        refuse_alone(self._told)

    def lost(self, error: RuntimeError) -> TrainingError | None:
        """What a collective's failure in a step means; None for any other error. (NCCL's watchdog ends the process itself.)"""
        words = str(error)
        if self.ranks is None or not (
            isinstance(error, dist.DistError) or any(one in words for one in _OF_COLLECTIVES)
        ):
            return None
        return TrainingError("MP548", "the step could not go on: a rank has ended, or is not there", why=words[-300:],
                             try_="that rank's own error says why; start all again from the last checkpoint")  # fmt: skip

    def agree(self, sent: Sent, facts: Callable[[], tuple[Facts, dict[str, Tensor]]]) -> None:
        """Before gradients are sent: the first time compare all, later that they are the same ones.

        Args:
          facts: gives what is to be alike: words and numbers, and tensors by name.

        Raises:
          TrainingError: MP546.
        """
        if self.ranks is None or sent == self._agreed:
            return
        if self._agreed is not None:
            pairs = itertools.zip_longest(self._agreed, sent, fillvalue=("", None))
            raise TrainingError("MP546", "this batch has other gradients, or in another order, than the batches before it",
                                where=next(now[0] or was[0] for was, now in pairs if was != now),
                                why="the other ranks may not have them, and would wait for others",
                                try_="let every batch reach the same parameters")  # fmt: skip
        words, tensors = facts()
        gradients = [(f"gradient of {name}", str(dtype)) for name, dtype in sent]
        agree(self.ranks, [*words, *gradients, *tensors_as_facts(tensors.items())])
        self._agreed = sent

    def order_of_buckets(self) -> list[Any]:
        """Which gradients travel together, in the order in which they are sent."""
        if self.scatterer is not None:
            return [] if self.scatterer.layout is None else self.scatterer.layout.facts()
        return [one for buckets in getattr(self.in_graph, "buckets", {}).values() for one in buckets]

    def forget(self) -> None:
        """Compare all again before gradients are sent next: the plan is another."""
        self._agreed = self._averages = None
        if self.scatterer is not None:
            self.scatterer.forget()

    def prepare(self, layout: Sent, sums: Sequence[Tensor]) -> None:
        """Make what averages a window's sums: who holds what of an update is known then."""
        if self.of_sums is not None and (self._averages is None or self._averages[0] != layout):
            self._averages = layout, self.of_sums.of_sums(sums, [name for name, _ in layout])

    def average(self, layout: Sent, sums: Sequence[Tensor]) -> Sequence[Tensor]:
        """The averages over the ranks of a window's sums: in place, or the rank's pieces of them."""
        self.prepare(layout, sums)
        return sums if self._averages is None else self._averages[1](sums)


def facts_of(step: Any) -> tuple[Facts, dict[str, Tensor]]:
    """What the ranks of a `TrainStep` must have alike."""
    plan, specializations = step.context, step.specializations
    words: Facts = [
        ("torch", torch.__version__),
        ("policy", str(step.policy)),
        ("accumulate", plan.accumulate),
        ("max_grad_norm", plan.max_grad_norm),
        ("loss scale", repr(plan.rule)),
        ("optimizer", plan.optimizers.name),
    ]
    for number, group in enumerate(plan.optimizers.groups):
        words += [(f"{key} of group {number}", repr(v)) for key, v in group.items() if _is_plain(v)]
    for specialization in specializations:
        words += [(f"precision of {node.id}", node.precision) for node in specialization.joint.forward.plan.graph]
    tensors = {f"loss scale's {name}": value for name, value in plan.state._asdict().items()}
    for bucket, numbers in enumerate(step.team.order_of_buckets()):
        words.append((f"bucket {bucket} of gradients", repr(numbers)))
    tensors |= {f"buffer {name}": held for name, held in step.model.named_buffers()}
    tensors |= {name: held for name, held in specializations.named.items() if isinstance(held, Tensor)}
    if plan.shares is not None:
        # Each rank's state is of its own pieces.
        return words, tensors
    names = {id(held): name for name, held in specializations.named.items()}
    for optimizer in plan.optimizers:
        for held, state in optimizer.state.items():
            mine = {k: v for k, v in state.items() if isinstance(v, Tensor)}
            tensors |= {f"{names.get(id(held), 'parameter')}.{k}": v for k, v in mine.items()}
    return words, tensors


def _is_plain(value: Any) -> bool:
    several = value if isinstance(value, (tuple, list)) else (value,)
    return all(isinstance(one, (int, float, str, bool, type(None))) for one in several)


__all__ = ["Team", "facts_of"]
