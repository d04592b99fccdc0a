"""The code in the documents runs as it stands."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"


def _blocks(name: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (DOCS / name).read_text(), flags=re.S)


@pytest.fixture
def mono_forward(tmp_path, monkeypatch):
    source = _blocks("writing_a_method.md")[0]
    (tmp_path / "mono_forward.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    yield source
    sys.modules.pop("mono_forward", None)


def test_a_whole_method_takes_under_80_lines(mono_forward):
    assert len(mono_forward.splitlines()) < 80


def test_the_method_of_the_guide_trains(mono_forward, capsys):
    space: dict = {}
    exec(compile(_blocks("writing_a_method.md")[1], "<guide>", "exec"), space)
    program, report, x, y = (space[name] for name in ("program", "report", "x", "y"))
    first = report.objectives
    assert set(first) == {"1.layer_1", "3.layer_3", "4.loss"}
    last = [program.step(x, y) for _ in range(100)][-1].objectives
    assert all(last[name] < first[name] for name in first)
    assert "objective(head_loss)" in capsys.readouterr().out


def test_the_method_of_the_guide_is_dgl_with_a_bare_projection(mono_forward):
    import torch
    from mono_forward import MonoForward
    from torch import nn

    import locc
    import support

    x, y = torch.randn(6, 4, dtype=torch.float64), torch.randint(3, (6,))
    model = support.mlp().double()
    program = locc.compile(model, MonoForward(), ["relu1"], example_inputs=x, optimizer=support.sgd())
    matrix = program.root.aux["relu1_relu1"].weight.detach().clone()
    first = nn.Linear(4, 8).double()
    first.load_state_dict(model.first.state_dict())
    m = matrix.clone().requires_grad_()
    nn.functional.cross_entropy(torch.relu(first(x)) @ m.T, y).backward()
    program.step(x, y)
    torch.testing.assert_close(model.first.weight, first.weight - 0.1 * first.weight.grad, rtol=0, atol=1e-10)
    torch.testing.assert_close(
        program.root.aux["relu1_relu1"].weight, matrix - 0.1 * m.grad, rtol=0, atol=1e-10
    )


def test_a_model_that_the_method_does_not_fit_is_refused(mono_forward):
    import torch
    from mono_forward import MonoForward

    import locc
    import support

    with pytest.raises(locc.MethodError, match=r"it predicts f32\[B,4,11\], not one row of class scores"):
        locc.compile(
            support.Tied(),
            MonoForward(),
            ["mid"],
            tied="copy",
            example_inputs=torch.zeros(2, 4, dtype=torch.long),
        )
