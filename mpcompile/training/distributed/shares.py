"""Masters and moments of which each rank holds a share, and how the whole is had again.

After an update each rank has new numbers for its share of every bucket; `spread` gathers them: low copies straight into
the shadows that the graphs read, FP32 only of the weights that a graph reads in FP32.  A weight known by its shadow alone
has no FP32 master on any rank: the model's `Parameter` holds the shadow meanwhile, as with split masters.  State dicts,
loading and `full_masters` gather what is missing, and so are calls of all ranks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mpcompile.errors import TrainingError
from mpcompile.shadows.step_shadows import ShadowSet
from mpcompile.torch_internals.tensors import foreach_copy, pytree, version
from mpcompile.training.distributed.layout import Bucket, Piece, ShareLayout, memory_order
from mpcompile.training.distributed.meeting import Meeting
from mpcompile.training.distributed.one_decision import of_all
from mpcompile.training.distributed.ranks import Ranks
from mpcompile.training.distributed.share_optimizers import ShareOptimizers, lies_as
from mpcompile.training.optimizer.hosts import Optimizers
from mpcompile.training.optimizer.step_counters import counters_of


class Spread(NamedTuple):
    """What an update of shares leaves to be gathered, one entry a bucket.

    Fields:
      shares: low, or (`pieces` holds FP32) what these are put together in.
      pieces: (where in the share, tensor) as two lists; empty for a low bucket.
      targets: flat views of what the graphs read; shadows, masters: of masters that have both, the pairs.
    """

    shares: list[Tensor]
    places: list[list[Tensor]]
    pieces: list[list[Tensor]]
    targets: list[list[Tensor]]
    shadows: list[Tensor]
    masters: list[Tensor]


def flat(tensor: Tensor) -> Tensor:
    """All elements of a dense tensor, as they lie in memory: a view of one dimension."""
    return tensor.detach().as_strided((tensor.numel(),), (1,), tensor.storage_offset())


class Shares:
    """One rank's shares, from when they are made to `release`.

    Args:
      layout: who holds what.
      named: the parameters, by the names that the layout uses.
      shadows: the shadows that graphs read.
      users: the user's optimizers.
    """

    # A window's sums are of whole parameters, and shared out at its end.
    of_sums = True

    def __init__(
        self, ranks: Ranks, meeting: Meeting, layout: ShareLayout, named: dict[str, Tensor], shadows: ShadowSet,
        users: Optimizers,
    ) -> None:  # fmt: skip
        self.ranks, self.layout, self._meeting, self._users = ranks, layout, meeting, users
        members = [one.name for bucket in layout.buckets for one in bucket.members]
        self.parameters = {name: named[name] for name in members}
        self._shadow_set = shadows
        self._shadows = {id(m): s for m, s in zip(shadows.masters, shadows.shadows, strict=True)}
        self._low_only = [
            self.parameters[one.name] for bucket in layout.buckets if self._is_lent(bucket) for one in bucket.members
        ]
        self._refuse_gaps()
        self._make_buffers()
        pieces = [(self.parameters.get(p.name), p, self.named[p.name]) for p in layout.pieces]
        self.optimizers = ShareOptimizers(users, list(self.parameters.values()), pieces)
        self._narrow()

    def _is_lent(self, bucket: Bucket) -> bool:
        """Whether its parameters hold something else than FP32 while they are shared out."""
        return not bucket.whole

    def _like(self, name: str, dtype: torch.dtype) -> Tensor:
        """A new tensor that lies as the parameter does when it is whole."""
        return torch.empty_like(self.parameters[name], dtype=dtype, requires_grad=False)

    def _refuse_gaps(self) -> None:
        for name, held in self.parameters.items():
            if not torch.ops.aten.is_non_overlapping_and_dense.default(held):
                raise TrainingError("MP549", "a weight that lies with gaps in memory cannot be divided",
                                    where=name, try_=f"{name}.data = {name}.data.contiguous()")  # fmt: skip

    def _make_buffers(self) -> None:
        """The rank's pieces: of FP32 shares, or (whole buckets) views of the parameters themselves."""
        device = next(iter(self.parameters.values())).device
        self.named: dict[str, Tensor] = {}
        self._masters: list[Tensor | None] = []
        self._low: list[Tensor | None] = []
        self.low_of: dict[str, Tensor] = {}
        for number, bucket in enumerate(self.layout.buckets):
            if bucket.whole:
                self._masters.append(None)
                self._low.append(None)
                for piece in self.layout.of_bucket(number):
                    self.named[piece.name] = self._cut_here(self.parameters[piece.name], piece)
                continue
            dtype = self._shadow_of(bucket.members[0].name).dtype
            self._masters.append(torch.zeros(bucket.chunk, device=device))
            self._low.append(torch.zeros(bucket.chunk, dtype=dtype, device=device))
            for piece in self.layout.of_bucket(number):
                self.named[piece.name] = at(self._masters[-1], piece)
                self.low_of[piece.name] = at(self._low[-1], piece)
        if not self.named:
            self.named[""] = torch.zeros(self.layout.pieces[0].length, device=device)
        self._spread = self._to_gather(device)

    def _shadow_of(self, name: str) -> Tensor:
        return self._shadows[id(self.parameters[name])]

    def _cut_here(self, tensor: Tensor, piece: Piece) -> Tensor:
        return flat(tensor)[piece.begin : piece.begin + piece.length]

    def _to_gather(self, device: torch.device) -> Spread:
        found = Spread([], [], [], [], [], [])
        for number, bucket in enumerate(self.layout.buckets):
            low = self._low[number]
            pieces = list(self.layout.of_bucket(number)) if bucket.whole else []
            share = torch.zeros(bucket.chunk, device=device) if low is None else low
            found.shares.append(share)
            found.places.append([at(share, piece) for piece in pieces])
            found.pieces.append([self.named[piece.name] for piece in pieces])
            read = [self.parameters[m.name] if bucket.whole else self._shadow_of(m.name) for m in bucket.members]
            found.targets.append([flat(one) for one in read])
            for one in bucket.members if bucket.whole else ():
                shadow = self._shadows.get(id(self.parameters[one.name]))
                if shadow is not None:
                    found.shadows.append(shadow)
                    found.masters.append(self.parameters[one.name].detach())
        return found

    # ------------------------------------------------------------------------------------------------- for an update

    def shadows(self) -> tuple[list[Tensor], list[Tensor]]:
        """(pieces, their low copies), where the update is to write low copies."""
        names = [piece.name for piece in self.layout.pieces if piece.name in self.low_of]
        return [self.named[name] for name in names], [self.low_of[name] for name in names]

    def examples(self) -> list[Tensor]:
        """Tensors such as the gradients of the pieces are."""
        device = next(iter(self.named.values())).device
        pairs = zip(self.layout.pieces, self.layout.mine, strict=True)
        return [torch.zeros(piece.length, dtype=dtype, device=device) for piece, (_, dtype) in pairs]

    def adopt(self) -> None:
        """Before an update is made: take in what became of the user's state."""
        self.optimizers.adopt(lambda whole, piece, whose: self._cut_state(whole, piece, whose))

    def link(self) -> None:
        """After an update was made: show the state that it made."""
        self.optimizers.link()

    def _cut_state(self, whole: Tensor, piece: Piece, whose: Tensor) -> Tensor:
        order = self._order_of(whose)
        laid = whole.permute(order) if order else whole
        return laid.reshape(-1)[piece.begin : piece.begin + piece.length].clone()

    def _order_of(self, whose: Tensor) -> tuple[int, ...]:
        return memory_order(whose)

    def spread(self) -> None:
        """Gather what the update wrote, into what the graphs read."""
        with torch.no_grad():
            _gather(self._spread, self.layout, self.ranks)

    def spreading(self) -> tuple[Any, list[Tensor]]:
        """(a function of tensors that does what `spread` does, the tensors), to be traced."""
        leaves, tree = pytree.tree_flatten(self._spread)

        def function(*given: Tensor) -> None:
            _gather(pytree.tree_unflatten(list(given), tree), self.layout, self.ranks)

        return function, leaves

    def written(self) -> list[Tensor]:
        """What an update writes at fixed addresses, beside its own pieces."""
        return [*self._spread.shares, *(one for part in self._spread.targets for one in part), *self._spread.shadows]

    # ---------------------------------------------------------------------------------------------- edits from outside

    def _narrow(self) -> None:
        """Let the parameters that shadows stand for hold these, their FP32 numbers being in the shares."""
        with torch.no_grad():
            for number, bucket in enumerate(self.layout.buckets):
                if bucket.whole:
                    continue
                for piece in self.layout.of_bucket(number):
                    self.named[piece.name].copy_(self._cut_here(self.parameters[piece.name], piece))
                    self.low_of[piece.name].copy_(self.named[piece.name])
                for one in bucket.members:
                    self._shadow_of(one.name).copy_(self.parameters[one.name])
                    self.parameters[one.name].data = self._shadow_of(one.name)
        self._open = False
        self.note()

    def note(self) -> None:
        """The parameters are as an update left them."""
        self._seen = self._look()

    def note_update(self) -> None:
        """An update wrote to all of them: compiled code raises no version."""
        torch.autograd.graph.increment_version(list(self.parameters.values()))
        self.note()

    def _look(self) -> tuple[list[int], list[int]]:
        return list(map(version, self._low_only)), list(map(Tensor.data_ptr, self.parameters.values()))

    def check(self) -> None:
        """Refuse to go on with weights that were edited where this rank has a share of their FP32 numbers.

        Raises:
          TrainingError: MP549.
        """
        if self._look() != self._seen:
            (now, lies), (was, lay) = self._look(), self._seen
            edited = {id(p) for p, a, b in zip(self._low_only, now, was, strict=True) if a != b}
            edited |= {id(p) for p, a, b in zip(self.parameters.values(), lies, lay, strict=True) if a != b}
            name = next(name for name, held in self.parameters.items() if id(held) in edited)
            raise TrainingError("MP549", "a weight was edited while each rank held only a share of it in FP32",
                                where=name, why="the edit reached the low copy alone, or another tensor",
                                try_="`with step.full_masters(): ...` on all ranks, around what edits weights")  # fmt: skip

    @contextlib.contextmanager
    def widened(self) -> Iterator[None]:
        """The parameters are FP32 inside, widened from their low copies: to capture a graph of them. No collective."""
        if self._open:
            yield
            return
        for parameter in self._low_only:
            parameter.data = self._shadows[id(parameter)].float()
        try:
            yield
        finally:
            for parameter in self._low_only:
                parameter.data = self._shadows[id(parameter)]
            self.note()

    def readable(self) -> contextlib.AbstractContextManager[None]:
        """What graphs read is there inside: always, where ranks hold it whole."""
        return contextlib.nullcontext()

    @contextlib.contextmanager
    def stretched(self) -> Iterator[None]:
        """The parameters are FP32 inside, of no numbers: for what looks at their dtype and shape alone."""
        before = [parameter.data for parameter in self._low_only]
        for parameter in self._low_only:
            parameter.data = torch.zeros((), device=parameter.device).expand(parameter.shape)
        try:
            yield
        finally:
            for parameter, held in zip(self._low_only, before, strict=True):
                parameter.data = held
            self.note()

    @contextlib.contextmanager
    def joined(self, what: str = "full_masters()") -> Iterator[None]:
        """The parameters are FP32 and whole inside; what was changed there is shared out again. A call of all ranks.

        Raises:
          TrainingError: MP548, where not all ranks come.
        """
        if self._open:
            yield
            return
        self.check()
        self._meeting.meet(what)
        self._widen()
        try:
            yield
        finally:
            self._narrow()

    def _widen(self) -> None:
        """Put FP32 masters, gathered, into the parameters that hold their low copies."""
        for number, bucket in enumerate(self.layout.buckets):
            share = self._masters[number]
            if share is None:
                continue
            whole = of_all(self.ranks, share)
            for one in bucket.members:
                parameter = self.parameters[one.name]
                full = self._like(one.name, torch.float32)
                flat(full).copy_(whole[one.start : one.start + one.count])
                parameter.data = full
        self._open = True

    def release(self) -> None:
        """Let every rank hold all of it again, masters and moments. A call of all ranks.

        Raises:
          TrainingError: MP548.
        """
        self._meeting.meet("giving back what was shared out")
        states = [self._state_of(number) for number in range(len(self._users.each))]
        self._widen()
        for user, whole in zip(self._users, states, strict=True):
            kept = {p: held for p, held in user.state.items() if p not in whole}
            user.state.clear()
            user.state.update({**kept, **whole})

    # ------------------------------------------------------------------------------------------------------- the state

    def whole_state(self, number: int) -> dict[Tensor, dict[str, Any]]:
        """The state of the user's optimizer `number`, by parameter, as one process would have it. A call of all ranks.

        Raises:
          TrainingError: MP548.
        """
        self._meeting.meet("optimizer.state_dict()")
        return self._state_of(number)

    def _state_of(self, number: int) -> dict[Tensor, dict[str, Any]]:
        self.adopt()
        twin: Any = self.optimizers.each[number]
        counters_of(twin).withdraw(twin.state)
        self.link()
        here = {p.name: twin.state.get(self.named[p.name]) for p in self.layout.pieces if p.name}
        known = self._meeting.of_all({name: self._words(name, state) for name, state in here.items() if state})
        words = {name: one for every in known for name, one in every.items()}
        whole = {name: dict[str, Any]() for name in words}
        for bucket_number, bucket in enumerate(self.layout.buckets):
            members = [one for one in bucket.members if one.name in words]
            keys = sorted({key for one in members for key, (kind, _) in words[one.name].items() if kind == "elements"})
            for key in keys:
                dtype = next(words[m.name][key][1] for m in members if key in words[m.name])
                gathered = self._gathered(bucket_number, key, dtype, here)
                for one in members:
                    if key in words[one.name]:
                        like = self._like(one.name, dtype)
                        flat(like).copy_(gathered[one.start : one.start + one.count])
                        whole[one.name][key] = like
        return {self.parameters[n]: self._in_order(words[n], whole[n]) for n in self.parameters if n in words}

    def _words(self, name: str, state: dict[str, Any]) -> dict[str, tuple[str, Any]]:
        piece = self.named[name]
        return {
            key: ("elements", value.dtype) if lies_as(key, value, piece) else _as_word(value)
            for key, value in state.items()
        }

    def _gathered(self, number: int, key: str, dtype: torch.dtype, here: dict[str, Any]) -> Tensor:
        device = next(iter(self.named.values())).device
        share = torch.zeros(self.layout.buckets[number].chunk, dtype=dtype, device=device)
        for piece in self.layout.of_bucket(number):
            held = (here.get(piece.name) or {}).get(key)
            if held is not None:
                at(share, piece).copy_(held)
        return of_all(self.ranks, share)

    def _in_order(self, words: dict[str, tuple[str, Any]], elements: dict[str, Tensor]) -> dict[str, Any]:
        device = next(iter(self.named.values())).device
        return {
            key: elements[key] if kind == "elements" else (value.to(device) if kind == "there" else value)
            for key, (kind, value) in words.items()
        }


def at(share: Any, piece: Piece) -> Tensor:
    """Where a piece lies in the rank's share of its bucket."""
    found: Tensor = share[piece.at : piece.at + piece.length]
    return found


def _as_word(value: Any) -> tuple[str, Any]:
    """A state that is no piece, as it travels: a number on the host, or one that lies with its parameter."""
    if not isinstance(value, Tensor):
        return "plain", value
    return "plain" if value.device.type == "cpu" else "there", value.detach().cpu().clone()


def _gather(given: Spread, layout: ShareLayout, ranks: Ranks) -> None:
    for number, bucket in enumerate(layout.buckets):
        if given.pieces[number]:
            foreach_copy(given.places[number], given.pieces[number])
        whole = of_all(ranks, given.shares[number])
        sources = [whole[one.start : one.start + one.count] for one in bucket.members]
        foreach_copy(given.targets[number], sources)
    if given.shadows:
        foreach_copy(given.shadows, given.masters)


__all__ = ["Shares", "Spread", "at", "flat"]
