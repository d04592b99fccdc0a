"""The replay buffer against its formulas; with room for one minibatch, against decoupled greedy learning."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from formulas import Array, Layer, batches, chain, error
from replay_buffer import Buffered, taken, written
from torch import nn

import locc
import support
from locc.testing import CONFORMANCE_MODELS, assert_conforms

RATE, SIZE, STRIDE = 0.3, 3, 2


def test_five_steps_are_those_of_the_formulas() -> None:
    model, data = chain(4, 5, 5, 3), batches(5, 6, 4, 3)
    program = locc.compile(
        model,
        Buffered(size=SIZE, stride=STRIDE),
        ["t1", "t2"],
        example_inputs=data[0][0],
        optimizer=support.sgd(RATE),
    )
    modules: list[nn.Module] = [model.l1, model.l2, model.l3, *program.root.aux.children()][:5]
    layers = [Layer(m, RATE) for m in modules]
    *body, last, head_1, head_2 = layers
    rings: list[list[tuple[Array, Array]]] = [[], []]
    for t, (x, y) in enumerate(data):
        a, labels, new = x.numpy(), y.numpy(), []
        for layer, head, ring in zip(body, (head_1, head_2), rings, strict=True):
            h = np.tanh(layer(a))
            delta = error(head(h), labels)
            dz = (delta @ head.w) * (1 - h**2)
            new += [(head, head.moved(h, delta)), (layer, layer.moved(a, dz))]
            if t < SIZE:
                ring.append((h, labels))
            else:
                ring[t % SIZE] = (h, labels)
            a, labels = ring[STRIDE * t % len(ring)]
        new.append((last, last.moved(a, error(last(a), labels))))
        for layer, values in new:
            layer.set(values)
        program.step(x, y)
        apart = [a.differs(b) for a, b in zip(layers, modules, strict=True)]
        assert max(apart) < 1e-10, (t, apart)


def test_the_policy_returns_each_age_in_turn() -> None:
    ring, found = torch.zeros(4, 1), []
    for t in range(12):
        ring = written(ring, torch.tensor([float(t)]), torch.tensor(t))
        found.append(t - int(taken(ring, torch.tensor(t), 2)))
    assert found == [0, 1, 1, 1, 0, 3, 2, 1, 0, 3, 2, 1]


def test_a_ring_of_one_is_decoupled_greedy_learning() -> None:
    x, y = support.batch()
    one, other = (
        support.compiled(
            support.mlp(), method, ["relu1", "relu2"], seed=3, optimizer=support.sgd(), **options
        )
        for method, options in ((Buffered(size=1), {}), ("dgl", {"head": "linear"}))
    )
    other.root.model.load_state_dict(one.root.model.state_dict())
    heads = ("relu1_head_relu1", "relu2_head_relu2")
    for head in heads:
        other.root.aux[head].load_state_dict(one.root.aux[head].state_dict())
    for i in range(3):
        assert torch.equal(one.step(x + i, y).loss, other.step(x + i, y).loss)
    assert support.same(support.snapshot(one.model), support.snapshot(other.model))


def test_values_that_skip_a_module_are_refused() -> None:
    with pytest.raises(locc.MethodError, match=r"'inp' skips from 'blocks.0' to 'output'; split where none"):
        support.compiled(support.Residual(), Buffered(), ["blocks.0", "blocks.1"])


def test_it_is_local_and_conforms() -> None:
    assert_conforms(Buffered, {"norm": CONFORMANCE_MODELS["norm"]})
