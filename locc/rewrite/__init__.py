"""Pass, Method, and the pipeline that runs them."""

from locc.rewrite.passes import Method, Pass, apply, configure, options

__all__ = ["Method", "Pass", "apply", "configure", "options"]
