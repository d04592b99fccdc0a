"""The batches at which an exported file is compared with PyTorch."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from locc import files
from locc.errors import ExportError
from locc.export.names import follow, output_paths
from locc.ir import BatchDim, Inputs, TensorSpec, TrainingGraph
from locc.ir.spec import FreeDim, Point, fit


@dataclass(frozen=True)
class Sample:
    """Inputs of a network at some sizes, and what PyTorch returns for them."""

    point: Point
    inputs: list[Tensor]
    outputs: list[Tensor]

    @property
    def text(self) -> str:
        """The sizes in words."""
        return f"batch size {self.point.batch}" + (" and other free dimensions" if self.point.probe else "")


@dataclass(frozen=True)
class Batches:
    """The sizes of an export.

    Attributes:
        trace: those at which the exporters run the network.
        checked: those at which the file is compared: a batch of 1, the example's and a larger one, as far as
            the model admits them, and the example's batch with other sizes of the free dimensions.
        dynamic: whether more than one size is possible at all.
    """

    trace: Point
    checked: tuple[Point, ...]
    dynamic: bool


@contextmanager
def inference_mode_of(root: nn.Module, *others: nn.Module) -> Iterator[None]:
    """Run in eval mode without gradients; on exit, undo every change of mode, buffers and generators."""
    modes = {module: module.training for owner in (root, *others) for module in owner.modules()}
    fused = torch.backends.mha.get_fastpath_enabled()
    try:
        with (
            buffers_kept(root),
            torch.random.fork_rng(),
            torch.no_grad(),
            torch.backends.cudnn.flags(allow_tf32=False),
        ):
            for module in modes:
                module.training = False
            # The fused kernels of nn.TransformerEncoder have no counterpart in ONNX.
            torch.backends.mha.set_fastpath_enabled(False)
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        for module, training in modes.items():
            module.training = training


@contextmanager
def buffers_kept(root: nn.Module) -> Iterator[None]:
    """Undo, on exit, what a forward writes into buffers, so that every run starts from the same values."""
    buffers = [(b, files.copy(b)) for b in root.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in buffers:
                if not torch.equal(buffer, value):
                    buffer.copy_(value)


def batches(ir: TrainingGraph, run: Callable[[list[Tensor]], Any]) -> Batches:
    """Choose the batch sizes; `run` takes flat inputs, and fails at a size it does not take."""
    example = example_tensors(ir)
    signature = ir.captured.signature
    own = signature.batch_of(example)
    probes = [Point(own, 1)] if any(spec.free for spec in signature.specs) else []
    if all(spec.batch_dim is None for spec in signature.specs):
        return Batches(Point(own), (Point(own), *probes), dynamic=bool(probes))

    def possible(batch: int) -> bool:
        if not signature.allows(batch):
            return False
        try:
            run(resized(ir, example, Point(batch)))
        except Exception:  # whatever the model raises on a batch that it does not take
            return False
        return True

    small = next((b for b in (1, 2) if b != own and possible(b)), own)
    large = next((b for b in (own + min(own, 8) + 3, own + 1, 2 * own) if possible(b)), own)
    middle = (
        own
        if own not in (small, large)
        else next((b for b in (own + 1, own + 2) if b != large and possible(b)), own)
    )
    checked = tuple(sorted({small, own, middle, large}))
    # An exporter takes a batch of one for a dimension that is broadcast.
    trace = next((b for b in (own, *checked) if b > 1), own)
    points = [*(Point(b) for b in checked), *(Point(checked[0], 1) for _ in probes)]
    return Batches(Point(trace), tuple(points), dynamic=len(points) > 1)


def example_tensors(ir: TrainingGraph) -> list[Tensor]:
    """Return the tensors of the example call.

    Raises:
        ExportError: the program keeps none, or its model branches on values, of which a file would keep one.
    """
    example = ir.captured.example
    if example is None:
        raise ExportError(
            "the program holds no example inputs to export with; compile it with example_inputs"
        )
    for decision in ir.captured.signature.decisions:
        if not decision.raises:
            raise ExportError(
                f"the model decides on values of its inputs, at {decision.place}, and a file would hold one "
                f"of the branches; {decision.remedy}"
            )
    device = next((p.device for p in ir.root.parameters()), torch.device("cpu"))
    return [t.detach().to(device) for t in ir.captured.signature.flatten(example)]


def resized(ir: TrainingGraph, tensors: Sequence[Tensor], point: Point) -> list[Tensor]:
    """Return the tensors at other sizes: a slice, or repeated with small changes.

    Repeated rows are made to differ, so that a file that mixes up the samples of a batch is noticed:
    floating-point rows are scaled a little, rows of integers rolled (both keep a value in its range).
    """
    return [
        _resize(t.clone(), spec, point) for t, spec in zip(tensors, ir.captured.signature.specs, strict=True)
    ]


def _resize(tensor: Tensor, spec: TensorSpec, point: Point) -> Tensor:
    for dim, size in enumerate(spec.concrete(point.batch or 0, point.probe)):
        if isinstance(spec.shape[dim], FreeDim) and size != tensor.shape[dim]:
            tensor = tensor.index_select(dim, torch.arange(size, device=tensor.device) % tensor.shape[dim])
    return tensor if spec.batch_dim is None else _rows(tensor, spec.batch_dim, point.batch or 0)


def _rows(tensor: Tensor, dim: int, size: int) -> Tensor:
    own = max(int(tensor.shape[dim]), 1)
    rows = []
    for i in range(size):
        row, turn = tensor.select(dim, i % own), i // own
        if turn and tensor.is_floating_point():
            row = row * (1.0 - 0.125 * (turn % 4))
        elif turn and row.dim() and tensor.dtype != torch.bool:
            row = row.roll(turn, dims=-1)
        rows.append(row)
    return torch.stack(rows, dim) if rows else tensor.narrow(dim, 0, 0)


def call_with(ir: TrainingGraph, tensors: Sequence[Tensor]) -> Inputs:
    """Return the example call with other tensors in the place of its own."""
    example = ir.captured.example
    assert example is not None
    old = ir.captured.signature.flatten(example)
    # `deepcopy` takes what it finds in its memo for a copy that is made already.
    memo: dict[int, Any] = {id(a): b for a, b in zip(old, tensors, strict=True)}
    args, kwargs = copy.deepcopy((example.args, example.kwargs), memo)
    return Inputs(args, kwargs)


def truth(ir: TrainingGraph, program: nn.Module) -> Callable[[list[Tensor]], list[Tensor]]:
    """Return the program's own inference path as a function of flat inputs to flat outputs."""
    network = fx.GraphModule(ir.root, ir.inference) if ir.folded else None
    paths = output_paths(ir)

    def run(tensors: list[Tensor]) -> list[Tensor]:
        copies = [t.clone() for t in tensors]
        with buffers_kept(ir.root):
            if network is not None:
                return [t.detach().clone() for t in network(*copies)]
            inputs = call_with(ir, copies)
            result = program(*inputs.args, **inputs.kwargs)
            return [follow(path, result).detach().clone() for path in paths]

    return run


def spec_of(ir: TrainingGraph, values: dict[Point, Tensor]) -> TensorSpec:
    """Return the spec of a value from what it was at several sizes.

    Raises:
        ExportError: no spec has these shapes.
    """
    shapes = {point: tuple(value.shape) for point, value in values.items()}
    dims = fit(shapes, [dim for spec in ir.captured.signature.specs for dim in spec.free])
    if dims is None:
        raise ExportError(
            f"a value has shapes {list(shapes.values())}, which is no multiple of the batch size"
        )
    return TensorSpec(dims, next(iter(values.values())).dtype)


def onnx_shape(spec: TensorSpec) -> list[int | str]:
    """Return a shape as ONNX and the manifest write it: `["batch", 3, "H", "W"]`."""
    return [d if isinstance(d, int) else axis(d) for d in spec.shape]


def axis(dim: BatchDim | FreeDim) -> str:
    """Return the name of a dimension that may vary."""
    return str(dim).replace("B", "batch") if isinstance(dim, BatchDim) else dim.name
