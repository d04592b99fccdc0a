"""Features replay against its formulas, and against backpropagation where the weights rest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from features_replay import FeaturesReplay
from formulas import Array, Layer, batches, chain, error
from torch import Tensor

import locc
import support
from locc.testing import CONFORMANCE_MODELS, assert_conforms

RATE = 0.3


def test_five_steps_are_those_of_the_formulas() -> None:
    model, data = chain(4, 5, 5, 3), batches(5, 6, 4, 3)
    layers = [Layer(m, RATE) for m in (model.l1, model.l2, model.l3)]
    program = locc.compile(
        model, FeaturesReplay(), ["t1", "t2"], example_inputs=data[0][0], optimizer=support.sgd(RATE)
    )
    one, two, three = layers
    xs: list[Array] = []
    hs: list[Array] = []  # what module 2 has read
    to_one: list[Array | None] = []  # what module 2 has sent, by step
    to_two: list[Array | None] = []
    for t, (x, y) in enumerate(data):
        xs.append(x.numpy())
        hs.append(np.tanh(one(xs[t])))
        read = np.tanh(two(hs[t]))
        delta = error(three(read), y.numpy())
        new = [(three, three.moved(read, delta))]
        to_two.append(delta @ three.w)
        to_one.append(None)
        if t >= 1:  # module 2 is one step late
            dz = to_two[t - 1] * (1 - np.tanh(two(hs[t - 1])) ** 2)
            new.append((two, two.moved(hs[t - 1], dz)))
            to_one[t] = dz @ two.w
        if t >= 2:  # module 1 is two steps late
            dz = to_one[t - 1] * (1 - np.tanh(one(xs[t - 2])) ** 2)
            new.append((one, one.moved(xs[t - 2], dz)))
        for layer, values in new:
            layer.set(values)
        program.step(x, y)
        apart = [a.differs(b) for a, b in zip(layers, (model.l1, model.l2, model.l3), strict=True)]
        assert max(apart) < 1e-10, (t, apart)


def recording(found: dict[int, Tensor]) -> Callable[[Any], torch.optim.Optimizer]:
    """Return a factory of optimizers that change nothing and keep the gradients, by parameter."""

    def make(parameters: Any) -> torch.optim.Optimizer:
        optimizer = torch.optim.SGD(parameters, lr=0.0)

        def note(*_: Any) -> None:
            held = [p for group in optimizer.param_groups for p in group["params"]]
            found.update((id(p), p.grad.clone()) for p in held if p.grad is not None)

        optimizer.register_step_pre_hook(note)
        return optimizer

    return make


def test_late_gradients_of_resting_weights_are_those_of_backpropagation() -> None:
    model = support.Residual(3).double()  # with a value that skips a module: its gradient is two steps late
    data, splits = batches(4, 5, 4, 3), ["blocks.0", "blocks.1"]
    late: dict[int, Tensor] = {}
    now: dict[int, Tensor] = {}
    program, plain = (
        locc.compile(model, method, splits, example_inputs=data[0][0], optimizer=recording(found))
        for method, found in ((FeaturesReplay(), late), ("bp", now))
    )
    for x, y in data:
        program.step(x, y)
    for age, module in enumerate(reversed(program.ir.modules)):
        plain.step(*data[-1 - age])
        for name, p in program.ir.parameters(module.name).items():
            torch.testing.assert_close(late[id(p)], now[id(p)], rtol=0, atol=1e-10, msg=name)


def test_it_is_local_and_conforms() -> None:
    assert_conforms(FeaturesReplay, {"residual": CONFORMANCE_MODELS["residual"]})


def test_a_module_holds_its_own_late_inputs_and_nobody_elses_gradient() -> None:
    program = support.compiled(support.Residual().double(), FeaturesReplay(), ["blocks.0", "blocks.1"])
    first = str(program.module_programs["blocks.0"])
    assert "self.aux.x_late" in first
    assert "self.aux.grad" not in first  # that is another owner's state, and comes as a value
