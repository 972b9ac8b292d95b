"""Rules: which operation has which verdict, and why. Data in TOML, read by `mpcompile.rules.table`."""

from mpcompile.rules.table import Kind, Rule, Rules, register, rules_for

__all__ = ["Kind", "Rule", "Rules", "register", "rules_for"]
