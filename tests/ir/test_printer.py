from __future__ import annotations

from torch import nn

import support
from locc.ir import Phase

BEFORE = """\
# 2 modules: first, output
def step(self, input_1, target):
    # ---- module 0: first
    first = self.first(input_1)  # f32[B,8]
    # ---- module 1: output
    first_at_output = stop_gradient(first)  # f32[B,8]
    relu1 = self.relu1(first_at_output)  # f32[B,8]
    drop = self.drop(relu1)  # f32[B,8]
    second = self.second(drop)  # f32[B,8]
    relu2 = self.relu2(second)  # f32[B,8]
    third = self.third(relu2)  # f32[B,3]
    loss = cross_entropy(third, target)  # f32[]
    objective(loss)  # output.loss
    grad_first_at_output = gradient(loss, first_at_output)  # f32[B,8]
    # ---- module 0: first
    grad_first_at_output_at_first = stop_gradient(grad_first_at_output)  # f32[B,8]
    chain = inner(first, grad_first_at_output_at_first)  # f32[]
    objective(chain)  # first.chain
    return third
"""


def test_the_graph_prints_as_python_grouped_by_owner():
    program = support.compiled(support.mlp(), "bp", ["first"])
    assert str(program.ir) == BEFORE
    compile(str(program.ir), "<printed>", "exec")


def test_the_header_shows_phases():
    ir = support.compiled(support.mlp(), "bp", ["first"]).ir
    ir.phases = (Phase("inverses", ("first",), epochs=2), Phase("warm", ("output",), warmup=True))
    text = str(ir)
    assert "# phase 'inverses', 2 pass(es) in each epoch, trains: first" in text
    assert "# phase 'warm', 1 pass(es) before the first epoch, trains: output" in text


def test_indices_print_as_subscripts():
    program = support.compiled(support.Residual(), "bp", ["blocks.0"])
    assert "self.blocks[0](inp)" in str(program.ir)


def test_a_dump_is_written_after_each_pass(tmp_path, monkeypatch):
    monkeypatch.setenv("LOCC_DUMP", str(tmp_path / "dump"))
    program = support.compiled(support.mlp(), "bp", ["first"])
    names = sorted(p.name for p in (tmp_path / "dump").iterdir())
    assert names == ["000_partition.py", "001_output_loss.py", "002_gradient_chain.py"]
    assert (tmp_path / "dump" / names[-1]).read_text() == str(program.ir)


class Indexing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.last = nn.Linear(3, 2)

    def forward(self, x):
        h = self.first(x)[:, None, 1:]
        return self.last(h[..., ::2].mean(1)[slice(None)])


def test_what_a_user_indexes_prints_as_python():
    text = str(support.compiled(Indexing(), "bp", ["first"]).ir)
    assert "[:, None, 1:]" in text
    assert "[Ellipsis, ::2]" in text
    compile(text, "<printed>", "exec")
