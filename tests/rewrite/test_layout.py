"""The memory format of what enters a module."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import locc


class Normalised(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm = nn.Conv2d(3, 4, 3), nn.Sequential(nn.GroupNorm(2, 4), nn.Conv2d(4, 4, 1))
        self.b, self.head = nn.Conv2d(4, 4, 1), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(self.norm(self.a(x).relu())).mean((2, 3)))


def test_a_group_norm_reads_what_needs_no_gradient_in_row_major_order() -> None:
    x = torch.randn(4, 3, 6, 6).to(memory_format=torch.channels_last)
    for method, copies in (("dgl", ["a"]), ("bp", [])):
        model = Normalised().to(memory_format=torch.channels_last)
        program = locc.compile(model, method, ["a", "norm"], example_inputs=x, verify=False)
        read = [n for n in program.ir.graph.nodes if n.name.startswith("copy")]
        assert [n.args[0].args[0].meta["owner"] for n in read] == copies
        program.step(x, torch.zeros(4, dtype=torch.long))  # the process would end here
