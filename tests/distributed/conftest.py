"""Every test here runs low, or says that it does not."""

from lowness import free_row, low_products

__all__ = ["free_row", "low_products"]
