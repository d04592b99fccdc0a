"""Split points -> modules and typed boundaries."""

from locc.partition.balance import Place, best_cuts, places
from locc.partition.build import partition
from locc.partition.splits import Cut, opened_by, resolve
from locc.partition.tied import TiedPolicy

__all__ = ["Cut", "Place", "TiedPolicy", "best_cuts", "opened_by", "partition", "places", "resolve"]
