"""All cases: importing the domains registers them."""

from __future__ import annotations

from rounding import (
    adversary,
    bayes,
    detection,
    diffusion,
    dynamics,
    flows,
    graphs,
    language,
    metric,
    points,
    published,
    recommender,
    regularisers,
    restoration,
    rl,
    selfsup,
    series,
    signal,
    speech,
    sundry,
    tabular,
    vision,
)
from rounding.registry import CASES, Case

DOMAINS = (
    adversary, bayes, detection, diffusion, dynamics, flows, graphs, language, metric, points, published,
    recommender, regularisers, restoration, rl, selfsup, series, signal, speech, sundry, tabular, vision,
)  # fmt: skip

__all__ = ["CASES", "DOMAINS", "Case"]
