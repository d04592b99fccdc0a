"""The models of the sweep: one of each family of torchvision and timm, and of many of transformers."""

from benchmarks.sweep.catalogue import of_timm, of_torchvision, of_transformers
from benchmarks.sweep.entries import Entry


def entries() -> list[Entry]:
    """Return them all; nothing is imported before an entry is asked to find its model."""
    return [*of_torchvision.entries(), *of_timm.entries(), *of_transformers.entries()]
