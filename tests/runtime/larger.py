"""Train in an eighth of the memory that parameters and optimizer state take: `larger.py PLACE FILE [resume]`.

PLACE is as in `offload=`, or "memory" for a run without. What counts is what RLIMIT_DATA counts, memory that
no file backs, beyond what this process has after it has trained something small.
"""

from __future__ import annotations

import resource
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

import locc

WIDTH, DEPTH, SHARE = 768, 24, 8


def compiled(depth: int, **options: Any) -> locc.Program:
    torch.manual_seed(0)
    blocks = (nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU()) for _ in range(depth))
    return locc.compile(
        nn.Sequential(*blocks, nn.Linear(WIDTH, 10)), "dgl", [str(i) for i in range(depth)], seed=1,
        optimizer=lambda ps: torch.optim.Adam(ps, lr=1e-4, fused=True), example_inputs=batch(0)[0],
        verify=False, **options,
    )  # fmt: skip


def batch(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(8, WIDTH, generator=generator), torch.randint(10, (8,), generator=generator)


def used() -> int:
    """Bytes, as RLIMIT_DATA counts them."""
    (line,) = (s for s in Path("/proc/self/status").read_text().splitlines() if s.startswith("VmData:"))
    return int(line.split()[1]) * 1024


def main(place: str, file: str, resume: bool) -> None:
    compiled(1).step(*batch(0))
    before = used()
    program = compiled(DEPTH, offload=None if place == "memory" else place)
    size = 3 * sum(p.nbytes for p in program.root.parameters())  # Adam has two numbers for each
    limit = before + size // SHARE
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    print(f"parameters and optimizer state: {size >> 20} MiB; limit: {size // SHARE >> 20} MiB", flush=True)
    if resume:
        program.load(file)
    for seed in range(program.steps, program.steps + 2):
        print(f"loss {float(program.step(*batch(seed)).loss)}", flush=True)
    program.save(file)
    print(f"beyond: {used() - before >> 20} MiB", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], "resume" in sys.argv)
