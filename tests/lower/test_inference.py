"""The inference path cut by owner: its programs, one after the other, compute what the model does."""

from __future__ import annotations

import pickle
from functools import partial
from typing import Any

import pytest
import torch

from locc.ir import Inputs
from locc.losses import judged
from locc.lower import Send, project
from locc.lower.inference import inference
from locc.runtime.machine import Held
from zoo import CASES, Case

USUAL = ("mlp", "changed_list")


class Travels(Held):
    """Channels between processes."""

    def send(self, instruction: Send, value: Any) -> None:
        super().send(instruction, pickle.loads(pickle.dumps(value)))


@pytest.mark.parametrize(
    "case", [pytest.param(c, id=c.name, marks=() if c.name in USUAL else pytest.mark.slow) for c in CASES]
)
def test_the_programs_of_inference_judge_what_the_model_returns(case: Case) -> None:
    for cut in range(len(case.splits)):
        program = case.compile(cut).eval()
        x, y, ir = case.inputs(), case.target(4), program.ir
        path = inference(ir, partial(judged, program.loss_function))
        values = [*ir.captured.signature.bind(Inputs.of(program.model, x)), y]
        buffers = {name: buffer.clone() for name, buffer in program.model.named_buffers()}
        with torch.no_grad():
            wanted = judged(program.loss_function, program.predict(x), y)
        for name, buffer in program.model.named_buffers():
            buffer.copy_(buffers[name])
        mail, found = Travels(), []
        for module in ir.modules:
            part = project(path.plan, [o for o, held in ir.owners.items() if held.index == module.index])
            found.append(program.built.executor.run(part, values, 0, mail)[1])
        assert [one for one in found if one is not None] == [found[-1]]
        assert found[-1] is not None
        assert torch.equal(found[-1], wanted)
