"""The hand-written references of the benchmark compute what they claim to."""

from __future__ import annotations

import copy

import pytest
import torch

from benchmarks.handwritten import DetachLoop
from benchmarks.models import WORKLOADS, segments, splits
from benchmarks.run import boundary_widths


@pytest.mark.parametrize("name", WORKLOADS)
@pytest.mark.parametrize("modules", [2, 12])
def test_segments_are_the_model_cut_at_its_splits(name: str, modules: int) -> None:
    workload = WORKLOADS[name]
    model = workload.model().eval()
    x = workload.batch()[0][:2]
    parts = segments(model, modules)
    assert len(parts) == modules == len(splits(modules)) + 1
    for part, split in zip(parts, splits(modules), strict=False):
        assert part[-1] is model.get_submodule(split)
    with torch.no_grad():
        h = x
        for part in parts:
            h = part(h)
        assert torch.equal(h, model(x))


def test_detach_loop_takes_the_gradient_of_each_local_loss() -> None:
    workload = WORKLOADS["mlp-small"]
    model = workload.model()
    x, y = (t[:8] for t in workload.batch())
    parts = segments(model, 4)
    heads = [workload.head(width) for width in boundary_widths(workload, parts, x)]
    reference = copy.deepcopy((parts, heads))
    losses = DetachLoop(parts, heads, workload.loss).step(x, y)

    h = x
    for part, head, old, old_head, loss in zip(
        parts,
        [*heads, torch.nn.Identity()],
        reference[0],
        [*reference[1], torch.nn.Identity()],
        losses,
        strict=True,
    ):
        parameters = [*old.parameters(), *old_head.parameters()]
        out = old(h)
        expected = workload.loss(old_head(out), y)
        torch.testing.assert_close(loss, expected.detach(), rtol=0, atol=0)
        expected.backward()
        torch.optim.Adam(parameters).step()
        for ours, theirs in zip([*part.parameters(), *head.parameters()], parameters, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-7)
        h = out.detach()
