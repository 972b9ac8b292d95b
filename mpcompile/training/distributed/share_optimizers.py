"""Optimizers of a rank's share: of the user's classes, on pieces of the user's parameters, with the user's numbers.

The user's optimizer stays what the user sees.  Its groups are read at every look; its state holds, for a parameter of
which this rank has a piece, the piece's own (moments of one dimension).  `state_dict()` gathers them: what one process
would have.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from mpcompile.errors import TrainingError
from mpcompile.training.distributed.layout import Piece
from mpcompile.training.optimizer.hosts import Optimizers
from mpcompile.training.optimizer.step_counters import counters_of

_OPTIM = torch.optim
# Each element of what they update depends on that element alone (and on counters): a piece is updated as the whole is.
BY_ELEMENT = (
    _OPTIM.Adam, _OPTIM.AdamW, _OPTIM.SGD, _OPTIM.Adagrad, _OPTIM.RMSprop, _OPTIM.Adadelta, _OPTIM.Adamax, _OPTIM.NAdam,
    _OPTIM.RAdam, _OPTIM.ASGD, _OPTIM.Rprop,
)  # fmt: skip

_COUNTERS = ("step", "mu_product", "eta", "mu")


def refuse_undivided(optimizers: Optimizers) -> None:
    """Refuse an optimizer that looks at whole parameters, or may.

    Raises:
      TrainingError: MP549.
    """
    for one in optimizers:
        if type(one) not in BY_ELEMENT:
            raise TrainingError("MP549", f"shard='update' cannot divide the update of {type(one).__name__}",
                                why="it may look at whole weights (Muon, Adafactor do), and a rank has pieces of them",
                                try_="shard='none'; or AdamW, Adam, SGD and torch.optim's others that go by element")  # fmt: skip


class ShareOptimizers(Optimizers):
    """The optimizers of one rank's pieces, in the order and with the groups of the user's.

    Args:
      users: the user's optimizers.
      shared: every parameter that is shared, those without a piece here too.
      pieces: (whose, place, tensor) of each piece; of padding the parameter is None.
    """

    def __init__(
        self, users: Optimizers, shared: Sequence[Tensor], pieces: Sequence[tuple[Tensor | None, Piece, Tensor]]
    ) -> None:
        self.users, self.pieces, self._shared = users, list(pieces), set(map(id, shared))
        self._of = {id(whose): tensor for whose, _, tensor in pieces if whose is not None}
        self._padding = [tensor for whose, _, tensor in pieces if whose is None]
        self.given, self.each, self.name = [], [self._twin(one) for one in users], users.name
        self.regroup()

    def _twin(self, user: torch.optim.Optimizer) -> torch.optim.Optimizer:
        twin = object.__new__(type(user))
        torch.optim.Optimizer.__init__(twin, [{**group, "params": []} for group in user.param_groups], user.defaults)
        return twin

    def regroup(self) -> None:
        """The user's groups hold other parameters than they did, or are others."""
        for user, twin in zip(self.users, self.each, strict=True):
            twin.param_groups = [{"params": self._pieces_of(group)} for group in user.param_groups]
        self.each[0].param_groups[0]["params"] += self._padding

    def _pieces_of(self, group: dict[str, Any]) -> list[Tensor]:
        return [self._of[id(p)] for p in group["params"] if id(p) in self._of]

    @property
    def groups(self) -> list[dict[str, Any]]:
        """The groups of the pieces, with the numbers that the user's have now."""
        mine = [group for one in self.each for group in one.param_groups]
        for group, user in zip(mine, self.users.groups, strict=True):
            held = group["params"]
            group.update(user)
            group["params"] = held
        return mine

    def refuse(self) -> None:
        """The user's are looked at."""

    def note_step(self) -> None:
        """Schedulers hold the user's."""
        self.users.note_step()

    # --------------------------------------------------------------------------------------------------- the state

    def _tables(self) -> Iterator[tuple[Any, Any, Tensor | None, Piece, Tensor]]:
        """(user's state, twin's state, parameter, place, piece) of each piece."""
        owner = {id(p): i for i, user in enumerate(self.users) for group in user.param_groups for p in group["params"]}
        for whose, place, tensor in self.pieces:
            number = owner.get(id(whose), 0) if whose is not None else 0
            yield self.users.each[number].state, self.each[number].state, whose, place, tensor

    def adopt(self, cut: Callable[[Tensor, Piece, Tensor], Tensor]) -> None:
        """Take in the user's state where it is not ours: loaded, emptied, or from before the parameters were shared.

        Args:
          cut: gives a piece of a tensor that has its parameter's shape.
        """
        self.regroup()
        moved = False
        for theirs, mine, whose, place, tensor in self._tables():
            if whose is None or theirs.get(whose) is mine.get(tensor):
                continue
            moved, given = True, theirs.get(whose)
            mine.pop(tensor, None)
            if given:
                mine[tensor] = {
                    key: cut(value, place, whose) if lies_as(key, value, whose) else _copy(value)
                    for key, value in given.items()
                }
        if moved:
            for one in self.each:
                counters_of(one).fresh.clear()
                counters_of(one).clear()
        self.link()

    def link(self) -> None:
        """Let the user's optimizers show the pieces' state, and no other."""
        fresh: list[dict[Tensor, Any]] = [{} for _ in self.each]
        number = {id(user.state): i for i, user in enumerate(self.users)}
        for theirs, mine, whose, _, tensor in self._tables():
            if whose is not None and tensor in mine:
                fresh[number[id(theirs)]][whose] = mine[tensor]
        for user, state in zip(self.users, fresh, strict=True):
            whole = {**{p: held for p, held in user.state.items() if id(p) not in self._shared}, **state}
            if list(map(id, user.state.values())) != list(map(id, whole.values())):
                user.state.clear()
                user.state.update(whole)


def lies_as(key: str, value: Any, whose: Tensor) -> bool:
    """True for state with an element for each of a parameter's; what counts steps is one number."""
    return isinstance(value, Tensor) and value.shape == whose.shape and bool(whose.dim() or key not in _COUNTERS)


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


__all__ = ["BY_ELEMENT", "ShareOptimizers", "lies_as", "refuse_undivided"]
