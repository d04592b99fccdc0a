"""A module's forward once more: forward-forward in one pass, changes in place, and what is refused."""

from __future__ import annotations

from typing import Any

import networkx as nx
import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional

import locc
from locc.ir import TrainingGraph
from locc.ir.order import dependencies
from locc.testing import assert_lowered
from rules import Rule, finish, mean_square, sent
from support import batch, compiled, mlp, sgd

THRESHOLD = 0.3


def normalised(h: Tensor) -> Tensor:
    return h / (h.norm(dim=1, keepdim=True) + 1e-4)


def shuffled(x: Tensor) -> Tensor:
    return x.roll(1, 0) * torch.linspace(-1, 1, x.shape[1], dtype=x.dtype)


def goodness(positive: Tensor, negative: Tensor) -> Tensor:
    up = functional.softplus(THRESHOLD - positive.square().mean(1))
    down = functional.softplus(negative.square().mean(1) - THRESHOLD)
    return (up + down).mean()


def forward_forward(ir: TrainingGraph) -> None:
    """Every module on positives and negatives; what a module reads is normalised, by a node of this pass."""
    ir.folded = True
    (x,) = ir.inputs
    negative = ir.emit(ir.modules[0].name, shuffled, x, name="negative")
    read = x
    for module in ir.modules[:-1]:
        owner = module.name
        if read is not x:
            normal = ir.emit(owner, normalised, read, name="normal")
            for user in [u for u in read.users if u is not normal and u.meta["owner"] == owner]:
                user.replace_input_with(read, normal)
        value = sent(ir, owner)
        (other,) = ir.replay(owner, {read: negative}, [value], "negative")
        ir.objective(owner, ir.emit(owner, goodness, value, other, name="goodness"), "goodness")
        (boundary,) = ir.boundaries(producer=owner)
        read, negative = boundary.entry, ir.stop_gradient(boundary.consumer, other)
    ir.objective(ir.last.name, ir.apply_loss(), "loss")


class ByHand:
    """Forward-forward without a compiler: plain PyTorch, one optimizer for each module."""

    def __init__(self, model: nn.Sequential) -> None:
        self.parts = [model[0:2], model[3:5], model[5:]]
        self.optimizers = [torch.optim.SGD(part.parameters(), lr=0.1) for part in self.parts]

    def step(self, x: Tensor, y: Tensor) -> None:
        positive, negative = x, shuffled(x)
        for i, part in enumerate(self.parts[:-1]):
            if i:
                positive, negative = normalised(positive), normalised(negative)
            positive, negative = part(positive), part(negative)
            self._train(i, goodness(positive, negative))
            positive, negative = positive.detach(), negative.detach()
        self._train(2, functional.cross_entropy(self.parts[2](positive), y))

    def _train(self, i: int, loss: Tensor) -> None:
        self.optimizers[i].zero_grad()
        loss.backward()
        self.optimizers[i].step()


def test_forward_forward_in_one_pass_sees_other_negatives_in_every_module():
    model, oracle = mlp().double(), mlp().double()
    oracle.load_state_dict(model.state_dict())
    program = compiled(model, Rule(forward_forward), ["relu1", "relu2"], optimizer=sgd(0.1))
    assert_lowered(program, *batch(dtype=torch.float64))
    by_hand = ByHand(oracle)
    for size in (5, 4, 7):
        program.step(*batch(size, torch.float64))
        by_hand.step(*batch(size, torch.float64))
    for name, value in oracle.state_dict().items():
        assert torch.allclose(model.state_dict()[name], value, rtol=0, atol=1e-10), name


# ---- changes in place ----------------------------------------------------------------------------


class InPlace(nn.Module):
    """Drops the results of what it changes in place: a slice, and a buffer that counts."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        h = self.second(self.first(x))
        self.count.add_(1)
        h[:, 0] = 0.5
        h[:, 1:3].mul_(self.count)
        return self.third(torch.tanh(h))


@pytest.mark.parametrize("moves", [False, True])
def test_a_replay_changes_in_place_what_the_forward_does_and_moves_buffers_if_asked(moves: bool) -> None:
    def replayed(ir: TrainingGraph) -> None:
        owner = ir.last.name
        (boundary,) = ir.boundaries(consumer=owner)
        other = ir.emit(owner, torch.neg, boundary.entry)
        (output,) = ir.replay(owner, {boundary.entry: other}, [ir.output], "replay", moves=moves)
        ir.objective(owner, ir.emit(owner, mean_square, output), "size")
        finish(ir, owner)

    model = InPlace().double()
    program = compiled(model, Rule(replayed), ["first"], optimizer=sgd(0.1))
    _, again = [node for node in program.ir.graph.nodes if node.target == "add_"]
    assert nx.has_path(dependencies(program.ir.graph), program.ir.output, again) == moves
    x, y = batch(dtype=torch.float64)
    for step in (1, 2):
        with torch.no_grad():
            h = model.second(-model.first(x))
            h[:, 0] = 0.5
            h[:, 1:3] *= 2 * step if moves else step + 1
            wanted = mean_square(model.third(torch.tanh(h)))
        report = program.step(x, y)
        assert float(model.count) == (2 * step if moves else step)
        assert float(report.objectives["output.size"]) == pytest.approx(float(wanted), abs=1e-12)


# ---- what is refused -----------------------------------------------------------------------------


def replaying(inputs: Any, wanted: Any) -> Rule:
    """Replays the last module."""

    def rewrite(ir: TrainingGraph) -> None:
        ir.replay(ir.last.name, inputs(ir), wanted(ir), "replay")

    return Rule(rewrite)


def entry(ir: TrainingGraph) -> fx.Node:
    return ir.boundaries(consumer=ir.last.name)[0].entry


def called(ir: TrainingGraph, target: str) -> fx.Node:
    return next(n for n in ir.graph.nodes if n.target == target)


def test_an_input_that_nothing_reads_is_named():
    def inputs(ir: TrainingGraph) -> dict[fx.Node, fx.Node]:
        first = called(ir, "model.second")
        return {entry(ir): ir.emit(ir.last.name, torch.neg, entry(ir)), ir.output: first, first: first}

    method = replaying(inputs, lambda ir: [called(ir, "model.relu2")])
    with pytest.raises(
        locc.errors.GraphError, match=r"replays 'output' with another \w+, third, which the val"
    ):
        compiled(mlp(), method, ["first"])


def test_a_value_of_another_shape_is_refused():
    def inputs(ir: TrainingGraph) -> dict[fx.Node, fx.Node]:
        return {entry(ir): ir.emit(ir.last.name, torch.cat, [entry(ir), entry(ir)], name="both")}

    with pytest.raises(
        locc.errors.GraphError, match=r"'both', f32\[2\*B,8\], in the place of 'first_at_output'"
    ):
        compiled(mlp(), replaying(inputs, lambda ir: [ir.output]), ["first"])
