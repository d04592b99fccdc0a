"""Pass and Method, the pipeline that runs them, and the verbs and passes from which methods are made.

One subject a file: `chain` (gradients handed down), `tangents` (pushed up), `crossing` (what modules send),
`reach` (what learns), `output` (the loss, and its error), `heads`, `positions` (some of a sequence's),
`unembedding` (the model's own last layer), `inverses`, `objectives` (sums of terms),
`noise`, `dropout`, `layouts` (specs), `building` (networks), `targets` (what a method reads), `traits` (what
a network has).
A pass emits nodes with the verbs of `locc.ir.TrainingGraph`.
"""

from locc.recipes import OptimizerSpec, Recipe
from locc.rewrite.building import Given, build, build_custom, given_for
from locc.rewrite.chain import GradientChain, handed_down, returning
from locc.rewrite.crossing import (
    LentGradients,
    activations,
    advised,
    has_rows,
    in_blocks,
    read_by,
    rows,
    unreached,
)
from locc.rewrite.dropout import before_dropout, give_copy, in_place, is_dropout
from locc.rewrite.heads import (
    LAYOUT,
    LOCAL_LOSS,
    POSITIONS,
    RANK,
    AttachHeads,
    LocalLoss,
    blocked,
    local_modules,
    local_values,
    untrained,
)
from locc.rewrite.inverses import Activation, InverseMaker, range_of
from locc.rewrite.layouts import layout_at, output_layout, prediction_spec, spec_of
from locc.rewrite.local_loss import LossLike, head_loss, heads_of
from locc.rewrite.noise import disturb, draw
from locc.rewrite.objectives import add_all, judged, squared_distance, weigh
from locc.rewrite.output import OutputLoss, output_error
from locc.rewrite.passes import Method, Pass, UndefinedError, apply, configure, option, options
from locc.rewrite.reach import learned, trained
from locc.rewrite.tangents import before_nonlinearity, pull, push
from locc.rewrite.targets import CLASS_IDS, NUMBERS, divided, own_target
from locc.rewrite.traits import averages_positions, ending, has_norms, has_rectifiers, is_rectified

__all__ = [
    "CLASS_IDS",
    "LAYOUT",
    "LOCAL_LOSS",
    "NUMBERS",
    "POSITIONS",
    "RANK",
    "Activation",
    "AttachHeads",
    "Given",
    "GradientChain",
    "InverseMaker",
    "LentGradients",
    "LocalLoss",
    "LossLike",
    "Method",
    "OptimizerSpec",
    "OutputLoss",
    "Pass",
    "Recipe",
    "UndefinedError",
    "activations",
    "add_all",
    "advised",
    "apply",
    "averages_positions",
    "before_dropout",
    "before_nonlinearity",
    "blocked",
    "build",
    "build_custom",
    "configure",
    "disturb",
    "divided",
    "draw",
    "ending",
    "give_copy",
    "given_for",
    "handed_down",
    "has_norms",
    "has_rectifiers",
    "has_rows",
    "head_loss",
    "heads_of",
    "in_blocks",
    "in_place",
    "is_dropout",
    "is_rectified",
    "judged",
    "layout_at",
    "learned",
    "local_modules",
    "local_values",
    "option",
    "options",
    "output_error",
    "output_layout",
    "own_target",
    "prediction_spec",
    "pull",
    "push",
    "range_of",
    "read_by",
    "returning",
    "rows",
    "spec_of",
    "squared_distance",
    "trained",
    "unreached",
    "untrained",
    "weigh",
]
