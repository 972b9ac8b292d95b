"""The whole suite in pieces, with counts: ``PYTHONPATH=tests python -m rounding.run [domain ...]``.

Every case in both types and both ways (the slow tests take each type in one way by turns). Prints a line per run outside its
bound, and a row of a Markdown table per domain: cases, runs, runs within the bound, the worst run as a share of its bound.
"""

from __future__ import annotations

import argparse
import os
import time
import traceback
import warnings
from collections.abc import Sequence
from dataclasses import replace

import torch

from rounding.exceptions import bound_of, draws_of
from rounding.measure import ROUNDINGS, WAYS, Distance, autocast, distances, reference
from rounding.registry import ROWS
from rounding.suite import CASES, DOMAINS, Case


def excesses(case: Case, low: str, backend: str) -> dict[str, dict[str, list[Distance]]]:
    """Way -> tensor -> its distance, one per draw of weights and batch."""
    found: dict[str, dict[str, list[Distance]]] = {way: {} for way in WAYS}
    for draw in range(max(draws_of(f"{case.name} {low} {way}") for way in WAYS)):
        drawn = replace(case, draw=draw)
        wanted, peer = reference(drawn), autocast(drawn, low)
        for way, run in WAYS.items():
            ours = run(drawn, low, backend)
            assert ours.low, "no product ran low, so nothing is proved"
            for one in distances(wanted, peer, ours):
                found[way].setdefault(one.what, []).append(one)
    return found


def worst(name: str, low: str, tensors: dict[str, list[Distance]]) -> tuple[float, Distance]:
    """The tensor that is most of its bound (by the median of its draws)."""
    roundings = bound_of(name, ROUNDINGS)
    middle = [sorted(each, key=lambda d: d.excess(low, roundings))[len(each) // 2] for each in tensors.values()]
    one = max(middle, key=lambda d: d.excess(low, roundings))
    return one.excess(low, roundings), one


def domain(name: str, lows: Sequence[str], backend: str) -> str:
    """A row of the table."""
    cases = [case for case in CASES.values() if case.domain == name]
    runs = held = 0
    most, where, began = 0.0, "", time.perf_counter()
    for case in cases:
        for low in (one for one in case.lows if one in lows):
            try:
                found = excesses(case, low, backend)
            except Exception:
                traceback.print_exc(limit=3)
                print(f"  {case.name} {low}: raised", flush=True)
                runs += len(WAYS)
                continue
            for way, tensors in found.items():
                share, one = worst(f"{case.name} {low} {way}", low, tensors)
                runs, held = runs + 1, held + (share <= 1)
                most, where = max((most, where), (share, case.name))
                if share > 1:
                    print(
                        f"  {case.name} {low} {way}: {one.what} {one.ours:.3g}, autocast {one.autocast:.3g}, {share:.2f}",
                        flush=True,
                    )
        torch._dynamo.reset()
    seconds = time.perf_counter() - began
    return f"| {name} | {len(cases)} | {runs} | {held} | {most:.2f} ({where.partition('/')[2]}) | {seconds:.0f} s |"


def row_of(kind: str, backend: str) -> str:
    """The first case of a kind of loss: in each type the worst tensor of both ways, ours and autocast's distance."""
    case = next(case for case in CASES.values() if case.row == kind)
    cells = []
    for low in case.lows:
        found = excesses(case, low, backend)
        share, one = max(
            (worst(f"{case.name} {low} {way}", low, tensors) for way, tensors in found.items()),
            key=lambda pair: pair[0],
        )
        cells.append(f"{one.ours:.2g} / {one.autocast:.2g} ({share:.2f})")
    return f"| {kind} | `{case.name}` | {' | '.join(cells)} |"


def main(given: Sequence[str] | None = None) -> None:
    """Print the table."""
    names = [module.case.name for module in DOMAINS]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("domains", nargs="*", default=names)
    parser.add_argument("--lows", nargs="*", default=["bf16", "fp16"])
    parser.add_argument("--backend", default="eager")
    parser.add_argument("--kinds", action="store_true", help="one case per kind of loss instead")
    options = parser.parse_args(given)
    warnings.simplefilter("ignore")
    os.environ["MPCOMPILE_PROGRESS"] = "0"
    if options.kinds:
        print("| kind of loss | case | BF16 | FP16 |\n|---|---|---|---|")
        for kind in ROWS:
            print(row_of(kind, options.backend), flush=True)
        return
    print("| domain | cases | runs | within the bound | worst share of the bound | time |\n|---|---|---|---|---|---|")
    for name in options.domains:
        print(domain(name, options.lows, options.backend), flush=True)


if __name__ == "__main__":
    main()
