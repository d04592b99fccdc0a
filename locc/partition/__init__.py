"""Split points -> modules and typed boundaries."""

from locc.partition.build import partition
from locc.partition.splits import Cut, opened_by, resolve
from locc.partition.tied import TiedPolicy

__all__ = ["Cut", "TiedPolicy", "opened_by", "partition", "resolve"]
