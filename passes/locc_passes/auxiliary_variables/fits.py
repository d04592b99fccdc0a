"""What modules learn from codes: an objective on those of the batch, or a fit to those of all batches."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from locc.ir import TensorSpec, TrainingGraph, node_tensors, owned_tensor, strip
from locc.rewrite import Pass, add_all, spec_of
from locc_passes.auxiliary_variables.codes import code_of, coded, mean_abs


@dataclass(frozen=True)
class FitCodes(Pass):
    """Trains each module on its codes.

    The last module has the user's loss, given the codes that it reads; every other module has
    mean (f(c) - sg c')^2 + lambda_w * mean |W|, with c the codes that it reads (the data, for the first
    one), c' those that it sends, and W each of its weights of two or more dimensions.
    """

    lambda_w: float = 0.0
    output_lr: float = 1.0

    def rewrite(self, ir: TrainingGraph) -> None:
        """Add the objectives; all of them read the same weights, those of before the update."""
        ir.apply_loss()  # of the plain forward: a step reports it, and it moves the last module's buffers
        ir.scale_lr(ir.last.name, self.output_lr)
        for module in ir.modules:
            owner = module.name
            codes = {b.entry: ir.stop_gradient(owner, code_of(b)) for b in coded(ir, consumer=owner)}
            if module == ir.last:
                output = self._run(ir, owner, codes, [ir.output])[0]
                loss = ir.loss_of(owner, output)
                ir.objective(owner, loss, "loss")
            else:
                self._fit(ir, owner, codes)

    def _fit(self, ir: TrainingGraph, owner: str, codes: dict[fx.Node, fx.Node]) -> None:
        sent = coded(ir, producer=owner)
        found = self._run(ir, owner, codes, [b.value for b in sent])
        terms = [
            ir.emit(owner, functional.mse_loss, value, ir.stop_gradient(owner, code_of(b)), role="fit")
            for value, b in zip(found, sent, strict=True)
        ]
        ir.objective(owner, add_all(ir, owner, terms + self._sparsity(ir, owner)), "codes")

    @staticmethod
    def _run(
        ir: TrainingGraph, owner: str, codes: dict[fx.Node, fx.Node], wanted: list[fx.Node]
    ) -> list[fx.Node]:
        """Run the owner's forward on codes; on the data once more only where that moves statistics."""
        held = (t for n in ir.nodes(owner) for _, t in node_tensors(ir.root, n))
        if codes or any(not isinstance(t, nn.Parameter) for t in held):
            return ir.replay(owner, codes, wanted, role="replay", moves=True)
        return wanted

    def _sparsity(self, ir: TrainingGraph, owner: str) -> list[fx.Node]:
        if not self.lambda_w:
            return []
        terms = []
        for path, parameter in ir.parameters(owner).items():
            if parameter.dim() > 1 and parameter.requires_grad:
                size = ir.emit(owner, mean_abs, ir.read(owner, path), role="sparsity")
                terms.append(ir.emit(owner, operator.mul, size, self.lambda_w, role="sparsity"))
        return terms


@dataclass(frozen=True)
class RememberCodes(FitCodes):
    """Sets the weight of each hidden module by sweeps of coordinate descent on ||W a - c||^2 of all batches.

    A = sum a a' and B = sum c a', from zero, with a what the module's linear layer reads of its codes and c
    the codes that it sends; with `forget`, A <- (1 - forget) A + forget a a', and so B. The last module
    trains as in `FitCodes`. A unit that was hardly ever on has a small a and gets a large weight: with ReLUs,
    batches have to be large from the first on.
    """

    forget: float = 0.0
    sweeps: int = 1

    def requires(self, ir: TrainingGraph) -> Iterator[str]:
        """Refuse hidden modules with more to train than the weight of a linear layer with which they end."""
        for module in ir.modules[:-1]:
            values = {b.value for b in coded(ir, producer=module.name)}
            layers = [owned_tensor(ir.root, str(v.target)) for v in values if v.op == "call_module"]
            weights = [layer.weight for layer in layers if isinstance(layer, nn.Linear)]
            others = {
                strip(path)
                for path, p in ir.parameters(module.name).items()
                if p.requires_grad and all(p is not w for w in weights)
            }
            if len(values) != 1 or len(weights) != 1 or others:
                more = f", and '{min(others)}' trains besides" if others else ""
                yield (
                    f"memory=True fits the weight of one nn.Linear with which a module ends, and module "
                    f"'{module.name}' is no such module{more}; split after each linear layer, give it "
                    "bias=False and no normalisation, or leave memory out"
                )

    def _fit(self, ir: TrainingGraph, owner: str, codes: dict[fx.Node, fx.Node]) -> None:
        (boundary, *_) = coded(ir, producer=owner)
        layer, path = boundary.value, f"{boundary.value.target}.weight"
        if not ir.parameters(owner)[path].requires_grad:
            return
        (reads,) = layer.all_input_nodes
        a = self._run(ir, owner, codes, [reads])[0]
        c = ir.stop_gradient(owner, code_of(boundary))
        weight = ir.read(owner, path)
        spec = spec_of(weight)
        outputs, inputs = spec.concrete(1)
        sums = []
        for name, rows, of in (("A", inputs, a), ("B", outputs, c)):
            held = ir.state(owner, f"{name}_{strip(path)}", TensorSpec((rows, inputs), spec.dtype))
            sums.append(ir.emit(owner, remembered, held, of, a, self.forget, role="memory"))
            ir.assign(owner, held, sums[-1])
        fitted = ir.emit(owner, by_columns, weight, *sums, self.lambda_w, self.sweeps, role="fit")
        ir.assign(owner, path, fitted)


def remembered(held: Tensor, rows: Tensor, a: Tensor, forget: float) -> Tensor:
    """Return held + rows' a, or (1 - forget) held + forget rows' a, summed over samples and positions."""
    found = rows.flatten(0, -2).mT @ a.flatten(0, -2)
    return (1 - forget) * held + forget * found if forget else held + found


def by_columns(
    weight: Tensor, a: Tensor, b: Tensor, shrink: float, sweeps: int, least: float = 1e-3
) -> Tensor:
    """Return W after sweeps over its columns, each moved to the minimum of tr(W A W') - 2 tr(W B') in it.

    Choromanska et al. 2019, after Mairal et al. 2009; released code.

    Args:
        weight: W, [m,n].
        a: A, [n,n]; a column whose diagonal is 0 stays as it is.
        b: B, [m,n].
        shrink: by which each entry then moves towards 0.
        sweeps: at most; those end when no entry moves by `least` or more.
        least: see `sweeps`.
    """
    scale = a.diagonal() + 1e-10
    a, b, w = a / scale, b / scale, weight.detach().clone()
    moves = torch.ones((), dtype=torch.bool, device=w.device)
    for _ in range(sweeps):
        before = w.clone()
        for j in range(w.shape[1]):
            column = w[:, j] + b[:, j] - w @ a[:, j]
            w[:, j] = functional.softshrink(column, shrink) if shrink else column
        w = torch.where(moves, w, before)
        moves = moves & ((w - before).abs().max() >= least)
    return w
