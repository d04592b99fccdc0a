"""What `predsim` and its kin may learn without labels: the similarities of a module's input, or the input."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch.nn.functional as F
from torch import Tensor, fx, nn

from locc.ir import TensorSpec, TrainingGraph
from locc.nn import Layout, build_inverse, guess_layout, similarity_matrix
from locc.rewrite import has_rows, is_rectified, layout_at, range_of, read_by, spec_of
from locc_passes.proxy.terms import LocalTerm


@dataclass(frozen=True)
class Unsupervised(LocalTerm):
    """A loss of a value h that a module sends and of the value x that it reads.

    "sim" is the mean square of S(z(h)) - S(x), with the map z of `AttachSimilarityHeads`, after which the
    pass runs; "recon" that of sigma(D h) - x, D a decoder of one layer and sigma the nonlinearity in which h
    ends (ReLU for its relatives). As in the released code the first module reconstructs nothing. Of several
    values that a module reads, x is the last.
    """

    name: str = "unsupervised"
    kind: str = "sim"

    def refusal(self, ir: TrainingGraph, value: fx.Node) -> str | None:
        """There is an x with a row for each sample of h."""
        x = self._read(ir, value)
        if x is None and self.kind == "sim":
            return "it reads no floating-point value whose similarities its output could have; use 'recon'"
        if x is not None and _rows(x) != _rows(value):
            return (
                f"it reads {spec_of(x)} and sends {spec_of(value)}, whose rows do not correspond; use "
                "loss_unsup='none', or cut elsewhere"
            )
        return None

    def term(self, ir: TrainingGraph, owner: str, value: fx.Node) -> fx.Node | None:
        """Return the loss; None for a first module that shall reconstruct."""
        x = self._read(ir, value)
        if x is None:
            return None
        if self.kind == "recon":
            decoded = self.network(ir, owner, value, partial(self._decoder, ir, value, x))
            return ir.emit(owner, F.mse_loss, decoded, x, role="unsupervised", spec=ir.scalar)
        (head,) = (head for head in ir.nodes(owner, "sim_head") if value in head.all_input_nodes)
        loss = InputSimilarity(x, layout_at(ir, x))
        return ir.emit(owner, loss, head, x, role="unsupervised", spec=ir.scalar)

    def _read(self, ir: TrainingGraph, value: fx.Node) -> fx.Node | None:
        owner = str(value.meta["owner"])
        found = [b.entry for b in read_by(ir, owner)]
        if not found and self.kind == "sim":
            own = set(ir.nodes(owner))
            inputs = [node for node in ir.inputs if not own.isdisjoint(node.users) and has_rows(node)]
            found = [node for node in inputs if spec_of(node).dtype.is_floating_point]
        return found[-1] if found else None

    @staticmethod
    def _decoder(
        ir: TrainingGraph, value: fx.Node, x: fx.Node, spec: TensorSpec, _: TensorSpec, **options: object
    ) -> nn.Module:
        bend = "relu" if is_rectified(value, ir.root) else range_of(value, ir.root)
        layouts = {"from_layout": options["layout"], "to_layout": layout_at(ir, x)}
        return build_inverse(spec, spec_of(x), bend, **layouts)  # type: ignore[arg-type]


class InputSimilarity:
    """The mean square of S(z) - S(x); no gradient reaches x."""

    def __init__(self, x: fx.Node, layout: Layout | None) -> None:
        self.layout = guess_layout(spec_of(x), layout)
        self.__name__ = self.__qualname__ = "input_similarity"

    def __call__(self, z: Tensor, x: Tensor) -> Tensor:
        """Return the loss, shape [], of z [B,D] or [B,D,*positions] and of x as the module reads it."""
        return F.mse_loss(similarity_matrix(z), similarity_matrix(self.layout.first(x.detach()).to(z.dtype)))


def _rows(value: fx.Node) -> object:
    spec = spec_of(value)
    return None if spec.batch_dim is None else spec.shape[spec.batch_dim]
