"""The passes of feedback that is learned from node perturbation."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from locc.ir import BatchDim, TensorSpec, TrainingGraph, owned_tensor, strip, tape_of
from locc.rewrite import (
    Pass,
    activations,
    add_all,
    divided,
    draw,
    give_copy,
    in_place,
    spec_of,
    squared_distance,
)
from locc_passes.feedback.layers import FeedbackMatrix, feedback_layer


class LearnedMatrix(nn.Module):
    """Holds one feedback matrix B that is learned."""

    def __init__(self, matrix: Tensor) -> None:
        super().__init__()
        self.matrix = nn.Parameter(matrix)


@dataclass(frozen=True)
class LearnedFeedback(Pass):
    """Gives each feedback matrix of a module to the auxiliary `<module>.feedback`, as a parameter.

    The module reads it as it is in each step, without a gradient. Where it is `solved` for it is a buffer,
    and zero at first. Runs after `FeedbackLayers`.
    """

    lr_scale: float = 1.0
    solved: bool = False

    def requires(self, ir: TrainingGraph) -> Iterator[str]:
        """What a matrix stands for is a layer of one module, and what it sends back a function of that."""
        learner: dict[str, str] = {}
        for matrix in _matrices(ir):
            name = strip(str(matrix.target).removeprefix("aux.feedback_").removesuffix(".matrix"))
            owner = str(matrix.meta["owner"])
            if learner.setdefault(name, owner) != owner:
                called = [
                    n for u in matrix.users if u.target is feedback_layer for n in u.all_input_nodes[1:2]
                ]
                layer = strip(str(called[0].target)) if called else name
                yield (
                    f"modules '{learner[name]}' and '{owner}' share the weight of '{layer}', and one of them "
                    "would learn its feedback; keep both uses in one module, or give each a weight of its own"
                )
            for use in matrix.users:
                if use.target is not feedback_layer:
                    yield (
                        f"'{name}' is multiplied by a function, and feedback is learned for layers; use "
                        "nn.Linear or a convolution there"
                    )

    def rewrite(self, ir: TrainingGraph) -> None:
        """Give the matrices to the auxiliaries."""
        for read in _matrices(ir):
            owner, path = str(read.meta["owner"]), str(read.target).removesuffix(".matrix")
            helper = f"{owner}.feedback"
            if helper not in ir.owners:
                ir.add_owner(helper, ir.owners[owner], self.lr_scale)
            held = owned_tensor(ir.root, str(read.target))
            assert isinstance(held, Tensor)
            if self.solved:
                held.zero_()
            else:
                ir.root.aux[path.removeprefix("aux.")] = LearnedMatrix(held)
            read.meta["owner"] = helper
            users = list(read.users)
            arriving = ir.stop_gradient(owner, read, role="feedback")
            read.append(arriving)  # before the forward that uses it
            for use in users:
                use.replace_input_with(read, arriving)


def _matrices(ir: TrainingGraph) -> list[fx.Node]:
    reads = [n for n in ir.graph.nodes if n.op == "get_attr" and str(n.target).endswith(".matrix")]
    holder = {n: owned_tensor(ir.root, str(n.target).removesuffix(".matrix")) for n in reads}
    return [n for n, held in holder.items() if isinstance(held, FeedbackMatrix)]


@dataclass(frozen=True)
class NodePerturbation(Pass):
    """Gives each matrix the objective ||B' d - (L~ - L) xi / c^2||^2: sum over units, mean over samples.

    A second forward pass adds xi ~ N(0, c^2) to what each layer with feedback reads; L~ and L are the losses
    of one sample with the noise and without; dropout drops the same units in both. d is the error at the
    layer's output in the clean pass, for one sample's loss, and B' d what the layer sends back through B; the
    estimate is, in expectation and for small c, the gradient for which it stands. The weights train on the
    clean pass alone.

    With `gamma`, B = V^-1 S instead: the least-squares fit to all steps so far, of linear layers, with V
    gamma I + the sum of d d', and S that of d times the estimate, over all samples.
    """

    noise: float = 0.1
    mean: bool = True
    gamma: float | None = None

    def requires(self, ir: TrainingGraph) -> Iterator[str]:
        """Each sample has a loss of its own, which nothing but the noise changes."""
        yield from divided(ir)
        if not _layers(ir):
            return
        if ir.output is not ir.prediction or not _by_sample(ir.prediction):
            yield (
                "it compares the losses of single samples, and the model returns more than one tensor "
                "[B,...]; return that alone"
            )
        for layer in _layers(ir):
            if not _by_sample(_read(layer)):
                yield (
                    f"layer '{_name(layer)}' reads {spec_of(_read(layer))}, whose rows are no samples, so "
                    "that no loss belongs to one; keep the batch in the first dimension"
                )
            if self.gamma is not None and not isinstance(_held(ir, layer), nn.Linear):
                kind = type(_held(ir, layer)).__name__
                yield (
                    f"layer '{_name(layer)}' is a {kind}, and the least-squares fit is that of a linear "
                    "layer; use solver='sgd'"
                )

    def rewrite(self, ir: TrainingGraph) -> None:
        """Add the noisy pass, and what the matrices learn from it."""
        layers = _layers(ir)
        if not layers:
            return
        for layer in layers:
            for user in list(layer.users):
                if in_place(ir, user):
                    give_copy(ir, user, layer)  # the error at the layer's output is taken there
        last, moved, noises = ir.last.name, dict[fx.Node, fx.Node](), dict[fx.Node, fx.Node]()
        for module in ir.modules:
            name = module.name
            found = {
                b.entry: ir.stop_gradient(name, moved[b.value])
                for b in ir.boundaries(consumer=name)
                if moved.get(b.value, b.value) is not b.value
            }
            for layer in (n for n in layers if n.meta["owner"] == name):
                x = _read(layer)
                noises[layer] = draw(ir, name, x, self.noise)
                noisy = ir.emit(name, torch.add, _again(ir, x, found), noises[layer], role="noise")
                matrix = _matrix(layer)
                (found[layer],) = ir.replay(
                    name, {x: noisy, matrix: matrix}, [layer], "perturbed", alike=True
                )
            for value in [ir.prediction] if name == last else activations(ir, name):
                moved[value] = _again(ir, value, found)
        losses = SampleLosses(ir.loss_function)
        spec = TensorSpec((BatchDim(),), spec_of(ir.prediction).dtype)
        perturbed, clean = (
            ir.emit(last, losses, ir.stop_gradient(last, value), ir.target, role="losses", spec=spec)
            for value in (moved[ir.prediction], ir.prediction)
        )
        change = ir.emit(last, torch.sub, perturbed, clean, role="losses")
        pairs: dict[fx.Node, list[Pair]] = {}
        for layer in layers:
            (matrix,) = _matrix(layer).all_input_nodes
            pairs.setdefault(matrix, []).append(self._pair(ir, layer, change, noises[layer]))
        if self.gamma is not None:
            for matrix, fitted in pairs.items():
                self._fit(ir, matrix, fitted, self.gamma)
            return
        regressions: dict[str, list[fx.Node]] = {}
        for matrix, fitted in pairs.items():
            terms = [self._regression(ir, matrix, pair) for pair in fitted]
            regressions.setdefault(str(matrix.meta["owner"]), []).extend(terms)
        for helper, terms in regressions.items():
            ir.objective(helper, add_all(ir, helper, terms), "regression")

    def _pair(self, ir: TrainingGraph, layer: fx.Node, change: fx.Node, noise: fx.Node) -> Pair:
        owner = str(layer.meta["owner"])
        helper = f"{owner}.feedback"
        xi = ir.stop_gradient(helper, noise)
        scalars = [o.all_input_nodes[0] for o in ir.objectives(owner)]
        errors = [ir.stop_gradient(helper, ir.gradient(s, layer)) for s in scalars if layer in tape_of(s)]
        error = reduce(lambda a, b: ir.emit(helper, operator.add, a, b, role="error"), errors)
        if self.mean:
            error = ir.emit(helper, of_sample, error, role="error")
        estimate = ir.emit(
            helper, estimated, ir.stop_gradient(helper, change), xi, self.noise, role="estimate"
        )
        return Pair(layer, error, estimate)

    @staticmethod
    def _regression(ir: TrainingGraph, matrix: fx.Node, pair: Pair) -> fx.Node:
        helper, back = str(matrix.meta["owner"]), Returned(_held(ir, pair.layer))
        given = (pair.error, matrix, pair.estimate)
        sent = ir.emit(helper, back, *given, role="returned", name="sent", spec=spec_of(pair.estimate))
        return ir.emit(helper, squared_distance, sent, pair.estimate, role="regression")

    @staticmethod
    def _fit(ir: TrainingGraph, matrix: fx.Node, pairs: list[Pair], gamma: float) -> None:
        helper, spec, name = str(matrix.meta["owner"]), spec_of(matrix), _name(pairs[0].layer)
        eye = torch.eye(spec.concrete(1)[0], dtype=spec.dtype)
        v = start_v = ir.state(helper, f"V_{name}", TensorSpec.of(eye), gamma * eye)
        s = start_s = ir.state(helper, f"S_{name}", spec)
        for pair in pairs:
            v = ir.emit(helper, summed, v, pair.error, pair.error, role="V")
            s = ir.emit(helper, summed, s, pair.error, pair.estimate, role="S")
        ir.assign(helper, start_v, v)
        ir.assign(helper, start_s, s)
        ir.assign(helper, str(matrix.target), ir.emit(helper, solved, v, s, role="fit"))


@dataclass(frozen=True)
class Pair:
    """What a matrix is fitted to: the error at a layer's output and the estimate at its input, by sample."""

    layer: fx.Node
    error: fx.Node
    estimate: fx.Node


def _layers(ir: TrainingGraph) -> list[fx.Node]:
    return [n for n in ir.nodes(role="forward") if n.target is feedback_layer]


def _read(layer: fx.Node) -> fx.Node:
    x = layer.args[0]
    assert isinstance(x, fx.Node)
    return x


def _matrix(layer: fx.Node) -> fx.Node:
    arriving = layer.args[2]
    assert isinstance(arriving, fx.Node)
    return arriving


def _held(ir: TrainingGraph, layer: fx.Node) -> nn.Module:
    return ir.root.get_submodule(str(layer.meta["stands_for"][1]))


def _name(layer: fx.Node) -> str:
    return strip(str(layer.meta["stands_for"][1]))


def _by_sample(value: fx.Node) -> bool:
    return spec_of(value).shape[:1] == (BatchDim(),)


def _again(ir: TrainingGraph, value: fx.Node, found: dict[fx.Node, fx.Node]) -> fx.Node:
    """Return a value of a module where some that it is computed from are others; itself where none is."""
    owner, met, todo, seen = value.meta["owner"], dict[fx.Node, fx.Node](), [value], set[fx.Node]()
    while todo:
        node = todo.pop()
        if node in found:
            met[node] = found[node]
        elif node not in seen and node.meta["owner"] == owner:
            seen.add(node)
            todo.extend(node.all_input_nodes)
    if value in met or not met:
        return met.get(value, value)
    return ir.replay(owner, met, [value], "perturbed", alike=True)[0]


class SampleLosses:
    """The loss of each sample, [B]."""

    def __init__(self, loss: Callable[[Any, Any], Tensor]) -> None:
        self.loss = loss
        self.__name__ = self.__qualname__ = "sample_losses"

    def __call__(self, output: Tensor, target: Any) -> Tensor:
        """Return the losses of batches of one; `target` has the samples first."""

        def alone(row: Tensor, wanted: Any) -> Tensor:
            return self.loss(row[None], torch.utils._pytree.tree_map(lambda t: t[None], wanted))

        losses: Tensor = torch.func.vmap(alone)(output, target)
        return losses


class Returned:
    """What a layer sends back for an error at its output, through a matrix in the place of its weight."""

    def __init__(self, layer: nn.Module) -> None:
        bare = copy.deepcopy(layer)
        if parametrize.is_parametrized(bare, "weight"):
            # Not remove_parametrizations: a copy has the class of the layer, which that changes.
            weight = nn.Parameter(torch.as_tensor(bare.weight).detach())
            bare.__class__ = parametrize.type_before_parametrizations(bare)
            del bare.parametrizations
            bare.weight = weight
        bare = bare.to("meta")
        bare.register_parameter("bias", None)
        self.layer = bare
        self.__name__ = self.__qualname__ = "returned"

    def __call__(self, error: Tensor, matrix: Tensor, like: Tensor) -> Tensor:
        """Return B' error, in the shape of `like`; differentiable in the matrix."""

        def forward(x: Tensor) -> Tensor:
            result: Tensor = torch.func.functional_call(self.layer, {"weight": matrix}, (x,))
            return result

        sent: Tensor = torch.func.vjp(forward, torch.zeros_like(like))[1](error)[0]
        return sent


def of_sample(error: Tensor) -> Tensor:
    """Return the gradient of each sample's loss, from that of their mean."""
    return error * len(error)


def estimated(change: Tensor, noise: Tensor, sigma: float) -> Tensor:
    """Return (L~ - L) xi / c^2, for changes of the loss [B] and noise [B,...] of deviation c."""
    return change.reshape(-1, *[1] * (noise.dim() - 1)) * noise / sigma**2


def summed(held: Tensor, error: Tensor, other: Tensor) -> Tensor:
    """Return held [m,n] + the sum of error other', of [...,m] and [...,n], over samples and positions."""
    return held + error.flatten(0, -2).mT @ other.flatten(0, -2)


def solved(v: Tensor, s: Tensor) -> Tensor:
    """Return V^-1 S, for V positive definite."""
    return torch.cholesky_solve(s, torch.linalg.cholesky(v))
