"""Small models of every domain, measured against FP32 beside CUDA's autocast: what may be rounded, and what not.

`registry` holds the cases, one file per domain registers its own; `emulated_autocast` is the yardstick, `measure`
runs both sides and gives distances, `exceptions` lists what is worse by design, with its bound and reason.
"""
