"""The hand-written references of the benchmark compute what they claim to."""

from __future__ import annotations

import copy

import pytest
import torch

from benchmarks.contestants import boundary_widths, handwritten, largest_module
from benchmarks.handwritten import DetachLoop, EndToEnd, LittleMemory
from benchmarks.meter import flops, peak
from benchmarks.models import WORKLOADS, Attention, segments, splits


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


def test_with_little_memory_the_same_bits_are_trained_at_the_price_of_a_second_forward() -> None:
    workload = WORKLOADS["mlp-small"]
    model = workload.model()
    x, y = (t[:8] for t in workload.batch())
    twin = copy.deepcopy(model)
    usual, little = EndToEnd(model, workload.loss), LittleMemory(twin, workload.loss)
    for _ in range(2):
        assert torch.equal(usual.step(x, y), little.step(x, y))
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert peak(lambda: little.step(x, y)).total < 0.5 * peak(lambda: usual.step(x, y)).total
    # the first block has no gradient of its input, the last layer is not computed again
    block, last = 2 * 8 * 512 * 512, 2 * 8 * 512 * 10
    assert flops(lambda: usual.step(x, y)) == 12 * 3 * block - block + 3 * last
    assert flops(lambda: little.step(x, y)) == 12 * 4 * block - block + 3 * last


def test_a_norm_that_is_folded_is_the_same_function_and_spares_a_product() -> None:
    plain = Attention(16, 2).double()
    for parameter in plain.norm.parameters():
        torch.nn.init.normal_(parameter)
    folded = copy.deepcopy(plain)
    folded.folded = True
    x = torch.randn(3, 5, 16, dtype=torch.float64)
    one, other = plain(x), folded(x)
    torch.testing.assert_close(one, other, rtol=0, atol=1e-10)
    spared = flops(one.square().sum().backward) - flops(other.square().sum().backward)
    matrix = 2 * 16 * 48  # of the queries, keys and values
    assert spared == (15 - 2) * matrix  # that of the input, but for the two gradients of the shift
    for ours, theirs in zip(plain.parameters(), folded.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-10)


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


def test_the_loop_by_hand_needs_the_memory_of_the_largest_module() -> None:
    workload = WORKLOADS["mlp-small"]
    model, (x, y) = workload.model(), workload.batch()
    alone = largest_module(workload, model, x, y, 12, inductor=False)[False]
    loop = handwritten(workload, model, x, y, 12)
    loop.step()
    assert loop.peak() == pytest.approx(alone, rel=0.01)
