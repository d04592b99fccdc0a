"""From a module to a forward graph that computes the same, or a refusal that says why not."""

from locc.capture.calls import marker_ancestors
from locc.capture.dynamic import Dynamic
from locc.capture.pipeline import capture

__all__ = ["Dynamic", "capture", "marker_ancestors"]
