"""Many adapters over one base, each row of a batch with its own."""

from .bank import AdapterBank

__all__ = ["AdapterBank"]
