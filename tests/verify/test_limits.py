"""What two steps on one batch cannot show: the limits of the proof that the documentation names.

Whoever lifts one of them moves it to the leaks that are refused, and out of the documentation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import locc

from .leaks import Chain, Leaf, chain, compiled, foreign_weight, plain


def _late(m: Any, x: Tensor) -> Tensor:
    m.calls = getattr(m, "calls", 0) + 1
    return foreign_weight(m, x) if m.calls > 1000 else plain(m, x)


def _at_one_batch_size(m: Any, x: Tensor) -> Tensor:
    return foreign_weight(m, x) if x.shape[0] == 7 else plain(m, x)


def _for_some_values(m: Any, x: Tensor) -> Tensor:
    return foreign_weight(m, x) if float(x.detach().abs().sum()) > 1e6 else plain(m, x)


def through_a_dict() -> locc.Program:
    board: dict[str, Tensor] = {}

    class Reading(Leaf):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + board.get("value", 0.0)

    def writing(m: Any, x: Tensor) -> Tensor:
        h = plain(m, x)
        board["value"] = float(h.detach().sum()) * torch.ones(())
        return h

    model = chain(writing, Reading())
    model.b.active = False  # capture would refuse it: it runs differently each time
    program = compiled(model)
    model.b.active = True
    locc.verify(program)
    return program


class _Lookahead(torch.optim.SGD):
    model: Chain
    calls = 0

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        super().step(closure)
        self.calls += 1
        if self.calls % 5 == 0:
            self.model.a.linear.weight.data.mul_(0.9)


def seldom() -> locc.Program:
    model = chain()
    kind = type("Lookahead", (_Lookahead,), {"model": model})
    return compiled(model, optimizer=lambda params: kind(params, lr=0.1))


def _scales(m: Any, x: Tensor) -> Tensor:
    if m.other.last.requires_grad:
        m.other.last.register_hook(lambda g: g * (1 + m.linear.weight.detach().mean()))
    return plain(m, x)


UNSEEN: dict[str, Callable[[], locc.Program]] = {
    "code that leaks after more steps than the checks run": lambda: compiled(chain(_late)),
    "code that leaks at a batch size that the checks do not try": lambda: compiled(chain(_at_one_batch_size)),
    "code that leaks for values that the checks do not try": lambda: compiled(chain(_for_some_values)),
    "an optimizer that meddles in some steps only": seldom,
    "values that travel without a tape through objects that are no modules": through_a_dict,
    "a hook that scales another module's own gradient by a value": lambda: compiled(chain(_scales), "bp"),
}


@pytest.mark.parametrize("what", UNSEEN)
def test_what_two_steps_on_one_batch_cannot_show(what: str) -> None:
    assert UNSEEN[what]().certificate.complete
