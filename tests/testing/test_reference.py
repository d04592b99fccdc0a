"""What a step means, against numbers worked out by hand (see `two_weights`)."""

from __future__ import annotations

import ast
import operator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import locc
from locc.ir import Phase, TrainingGraph
from locc.runtime.streams import seed_all, stream
from locc.testing import reference, reference_step

from .two_weights import NUMBER, X, Y, chained, delayed, hidden, model, program, rounds, weight, weights


def close(found: Any, *wanted: float) -> bool:
    return found == pytest.approx([*wanted] if isinstance(found, list) else wanted[0], abs=1e-12)


def test_objectives_and_gradients_are_of_the_weights_before_the_step() -> None:
    found = program(chained)
    report = reference_step(found, X, Y)
    assert close(float(report.objectives["two.loss"]), 26.5)
    assert close(float(report.objectives["one.chain"]), 2 * 2 + 7 * 6)
    assert close(float(report.loss), 26.5)
    assert close(weights(found), 2 - 0.1 * 23, -1 + 0.1 * 46)
    assert found.steps == 1


def test_a_stopped_gradient_trains_nobody_else() -> None:
    def local(ir: TrainingGraph) -> None:
        ir.objective("two", ir.apply_loss(), "loss")
        ir.objective("one", ir.emit("one", torch.mean, hidden(ir)), "mean")

    found = program(local)
    reference_step(found, X, Y)
    assert close(weights(found), 2 - 0.1 * 2, -1 + 0.1 * 46)


def test_state_is_read_as_before_the_step_and_an_assigned_parameter_holds() -> None:
    def assigned(ir: TrainingGraph) -> None:
        mean = ir.emit("one", torch.mean, hidden(ir))
        held = ir.state("one", "held", NUMBER, 10.0)
        ir.assign("one", held, mean)
        ir.objective("one", ir.emit("one", operator.mul, mean, held), "product")
        ir.objective("two", ir.apply_loss(), "loss")
        ir.assign(
            "two", "model.two.weight", ir.emit("two", operator.mul, ir.read("two", "model.two.weight"), 3)
        )

    found = program(assigned)
    assert close(float(reference_step(found, X, Y).objectives["one.product"]), 4 * 10)
    assert close(weights(found), 2 - 0.1 * 10 * 2, -3)
    assert close(float(reference_step(found, X, Y).objectives["one.product"]), 0)
    assert close(weights(found), 0 - 0.1 * 4 * 2, -9)


def test_a_repeated_region_carries_all_its_values_at_once() -> None:
    found = program(rounds)
    report = reference_step(found, X, Y)
    # (a, b, a + b) of the last round is (3, 5, 8), and z halves in each.
    assert close(float(report.objectives["two.product"]), 26.5 * 8 / 16)
    assert close(weights(found), 2 - 0.1 * 2, -1 + 0.1 * 46 * 8 / 16)
    (count,) = (b for name, b in found.root.named_buffers() if name.endswith("count.value"))
    assert close(float(count), 4)


def test_a_delayed_value_is_that_of_steps_ago() -> None:
    found = program(delayed)
    seen = []
    for _ in range(4):
        reference_step(found, X, Y)
        seen.append(weights(found)[0])
    # The mean is 2 * w1; the factors are 5, 5, and then the means of steps 1 and 2, 4 and 2.
    assert close(seen, 1.0, 0.0, -0.8, -1.2)


def test_a_phase_trains_its_owners_and_the_rest_rest() -> None:
    def phased(ir: TrainingGraph) -> None:
        chained(ir)
        ir.phases = (Phase("below", ("one",)), Phase("above", ("two",)))

    found = program(phased, model(("drop", nn.Dropout(0.5))))
    found.phase = "below"
    report = reference_step(found, X, Y)
    assert list(report.objectives) == ["one.chain"]
    assert close(weights(found), 2 - 0.1 * 23, -1)  # the dropout is of 'two', so nothing drops
    found.phase = "above"
    assert list(reference_step(found, X, Y).objectives) == ["two.loss"]
    assert close(weights(found)[0], 2 - 0.1 * 23)
    assert found.model.training


def test_a_delay_keeps_its_value_in_a_phase_that_only_reads_it() -> None:
    def late(ir: TrainingGraph) -> None:
        mean = ir.emit("one", torch.mean, hidden(ir))
        ir.objective("one", mean, "mean")
        before = ir.stop_gradient("two", ir.delay(mean, 1, 5.0))
        out = ir.emit("two", torch.mean, ir.prediction)
        ir.objective("two", ir.emit("two", operator.mul, out, before), "product")
        ir.phases = (Phase("above", ("two",)),)

    found = program(late)
    found.phase = "above"
    seen = []
    for _ in range(2):
        reference_step(found, X, Y)
        seen.append(weights(found)[1])
    assert close(seen, -1 - 0.1 * 4 * 5, -3 - 0.1 * 4 * 4)


def test_several_steps_make_one_update_of_their_mean() -> None:
    found = program("bp", accumulate=2)
    reference_step(found, X, Y)
    assert close(weights(found), 2, -1)
    reference_step(found, -X, Y)
    # The other batch has out = [2, 6], gradients [2, 5] for out, 2 * -2 + 5 * -6 = -34 for w2, -[2, 5] for h.
    assert close(weights(found), 2 - 0.1 * (23 + 2 * 1 + 5 * 3) / 2, -1 + 0.1 * (46 + 34) / 2)


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = weight(2.0), weight(-1.0)

    def forward(self, x: Tensor) -> Tensor:
        h = self.one(x)
        h.mul_(3)
        h += 1
        return self.two(h)


def test_a_value_that_is_changed_in_place() -> None:
    found = program("bp", InPlace().double())
    report = reference_step(found, X, Y)
    # h = [7, 19], out = [-7, -19], gradients [-7, -20] for out, [7, 20] for h and three times that before.
    assert close(float(report.loss), (49 + 400) / 2)
    assert close(weights(found), 2 - 0.1 * 3 * (7 + 60), -1 + 0.1 * (49 + 380))


def test_the_forward_is_autocast() -> None:
    net = model().float()
    nn.init.constant_(net.get_submodule("one").weight, 1.01)

    def distance(output: Tensor, target: Tensor) -> Tensor:
        return (output.float() - target).square().mean()

    found = program("bp", net, autocast="bfloat16", loss=distance)
    report = reference_step(found, torch.ones(2, 1), torch.zeros(2, 1))
    # In bfloat16, 1.01 is 129 / 128, and the sum of two squares of it is 130 / 64.
    assert float(report.loss) == (129 / 128) ** 2
    assert weights(found) == pytest.approx([1.01 - 0.1 * 2 * 129 / 128, -1 + 0.1 * 130 / 64], abs=2e-7)


def test_each_node_that_draws_has_a_stream_of_its_own() -> None:
    found = program("bp", model(("drop", nn.Dropout(0.5)), ("more", nn.Dropout(0.5))))
    x, y = torch.ones(64, 1, dtype=torch.float64), torch.zeros(64, 1, dtype=torch.float64)
    for step in range(2):
        masks = []
        for name in ("drop", "more"):
            seed_all(stream(3, step, name))
            masks.append(functional.dropout(torch.ones_like(x), 0.5))
        assert not torch.equal(*masks)
        one, two = weights(found)
        before = torch.get_rng_state()
        report = reference_step(found, x, y)
        assert torch.equal(before, torch.get_rng_state())
        assert close(float(report.loss), float((one * two * masks[0] * masks[1]).square().mean()))


def test_an_objective_that_is_not_finite_changes_nothing() -> None:
    found = program("bp")
    with pytest.raises(locc.RunError, match=r"objective 'two\.loss' is nan; nothing was updated"):
        reference_step(found, X * float("nan"), Y)
    assert weights(found) == [2, -1]


def test_the_reference_knows_no_plans_and_fits_on_a_page() -> None:
    text = Path(reference.__file__).read_text()
    assert len(text.splitlines()) <= 150
    tree = ast.parse(text)
    modules = [n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
    modules += [a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names]
    assert "locc.ir" in modules
    assert not [m for m in modules if "lower" in m or not m.startswith(("locc.", "torch", "typing", "__"))]
    used = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
    assert not used & {"plan", "plans", "module_programs", "lower", "run"}
