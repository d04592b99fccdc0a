"""What real networks are built of, inside a module: it works, or says in one sentence what to do."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.ao import quantization
from torch.nn import functional as F
from torch.nn import utils
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

import locc
import support
from support import batch, same, sgd, snapshot
from zoo import hf

SPLITS = ["a", "b"]


class Adapter(nn.Module):
    """A layer with low-rank adapters, as peft wraps one."""

    def __init__(self, base: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.base_layer = base.requires_grad_(False)
        self.lora_A, self.lora_B = nn.ModuleDict(), nn.ModuleDict()
        self.scaling: dict[str, float] = {}
        for name in ("default", "other"):
            self.lora_A[name] = nn.Linear(base.in_features, rank, bias=False)
            self.lora_B[name] = nn.Linear(rank, base.out_features, bias=False)
            self.scaling[name] = 2.0
        self.active, self.merged, self.disable_adapters = ["default"], False, False

    def forward(self, x: Tensor) -> Tensor:
        result = self.base_layer(x)
        if self.disable_adapters or self.merged:
            return result
        for name in self.active:
            result = result + self.lora_B[name](self.lora_A[name](x)) * self.scaling[name]
        return result


class Checkpointed(nn.Module):
    def __init__(self, inner: nn.Module, reentrant: bool) -> None:
        super().__init__()
        self.inner, self.reentrant = inner, reentrant

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, x, use_reentrant=self.reentrant)


def quantised(layer: nn.Module) -> nn.Module:
    found = nn.Sequential(layer)
    found.qconfig = quantization.get_default_qat_qconfig("fbgemm")
    return quantization.prepare_qat(found.train())


def observed(layer: nn.Module) -> nn.Module:
    return nn.Sequential(layer, quantization.FakeQuantize())


def synchronised(layer: nn.Module) -> nn.Module:
    return nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(layer, nn.BatchNorm1d(layer.out_features)))


def compiled(layer: nn.Module) -> nn.Module:
    return torch.compile(layer, backend="eager")


def compiled_in_place(layer: nn.Module) -> nn.Module:
    layer.compile(backend="eager")
    return layer


KINDS: dict[str, Callable[[nn.Linear], nn.Module]] = {
    "adapter": Adapter,
    "weight norm by hooks": utils.weight_norm,
    "weight norm": parametrizations.weight_norm,
    "spectral norm by hooks": utils.spectral_norm,
    "spectral norm": parametrizations.spectral_norm,
    "checkpoint": lambda layer: Checkpointed(layer, reentrant=False),
    "torch.compile": compiled,
    "module.compile()": compiled_in_place,
    "quantisation": quantised,
    "FakeQuantize": observed,
    "SyncBatchNorm": synchronised,
}
SINGLE = {"quantisation", "FakeQuantize"}  # their kernels know float32 only


def network(kind: Callable[[nn.Linear], nn.Module], dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """Three modules; the same weights in every call."""
    torch.manual_seed(0)
    model = nn.Sequential()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, and in use
        for name, width in (("a", 4), ("b", 6)):
            model.add_module(name, nn.Sequential(kind(nn.Linear(width, 6)), nn.Tanh()))
    model.add_module("c", nn.Linear(6, 3))
    return model.to(dtype)


def by_hand(model: nn.Sequential, heads: Mapping[str, nn.Module], x: Tensor, y: Tensor) -> None:
    """One step: of backpropagation where there are no heads, else each module on the loss of its own."""
    value = x
    for name, module in model.named_children():
        value = module(value.detach() if heads else value)
        if heads or name == "c":
            F.cross_entropy(heads[name](value) if name in heads else value, y).backward()
    trained = [*model.parameters(), *(p for head in heads.values() for p in head.parameters())]
    sgd()([p for p in trained if p.grad is not None]).step()
    for parameter in trained:
        parameter.grad = None


def gap(one: nn.Module, other: nn.Module) -> float:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return max(float((a.double() - b.double()).abs().max()) for a, b in pairs)


@pytest.mark.parametrize("method", ["bp", "dgl"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_is_the_one_written_by_hand(kind: str, method: str) -> None:
    dtype = torch.float32 if kind in SINGLE else torch.float64
    model, eager = (network(KINDS[kind], dtype) for _ in range(2))
    before, (x, y) = snapshot(model), batch(dtype=dtype)
    program = locc.compile(model, method, SPLITS, example_inputs=x, optimizer=sgd())
    assert same(before, snapshot(model))
    assert program.certificate.complete
    assert program.certificate.verdict == ("strictly modular" if method == "dgl" else "not modular")
    heads = {name.partition("_")[0]: copy.deepcopy(head) for name, head in program.root.aux.named_children()}
    for _ in range(3):  # a power iteration, an observer, a running mean: the second step meets the first's
        program.step(x, y)
        by_hand(eager, heads, x, y)
    assert gap(model, eager) < (1e-6 if kind in SINGLE else 1e-12)
    model.eval(), eager.eval()
    assert (program(x) - eager(x)).abs().max() < (1e-6 if kind in SINGLE else 1e-12)


@pytest.mark.parametrize("state", ["merged", "disable_adapters"])
def test_what_of_an_adapter_is_off_stays_as_it_is(state: str) -> None:
    model, (x, y) = network(Adapter), batch(dtype=torch.float64)
    setattr(model.b[0], state, True)
    before = snapshot(model)
    program = locc.compile(model, "bp", ["a"], example_inputs=x, optimizer=sgd())
    program.step(x, y)
    moved = {name for name, value in snapshot(model).items() if not torch.equal(value, before[name])}
    assert moved == {"a.0.lora_A.default.weight", "a.0.lora_B.default.weight", "c.weight", "c.bias"}


def test_a_compiled_module_is_not_compiled_at_the_sizes_that_locc_tries() -> None:
    graphs: list[Any] = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    model, (x, y) = network(lambda layer: torch.compile(layer, backend=backend)), batch(dtype=torch.float64)
    program = locc.compile(model, "dgl", SPLITS, example_inputs=x)
    locc.verify(program, x, y)
    assert not graphs
    program.step(x, y)
    assert len(graphs) == 2


def test_splits_inside_of_a_compiled_model_are_named_as_torch_does() -> None:
    model, (x, _) = torch.compile(network(nn.Sequential), backend="eager"), batch(dtype=torch.float64)
    with pytest.raises(locc.SplitError, match=r"split 'a' matches no submodule; .*'_orig_mod\.a'"):
        locc.compile(model, "dgl", ["a"], example_inputs=x)
    program = locc.compile(model, "dgl", ["_orig_mod.a"], example_inputs=x)
    assert program.certificate.complete


def test_a_checkpoint_holds_what_an_observer_has_sized(tmp_path: Any) -> None:
    x, y = batch()
    programs = [
        locc.compile(network(quantised, torch.float32), "dgl", SPLITS, example_inputs=x) for _ in range(2)
    ]
    for _ in range(2):
        programs[0].step(x, y)
    programs[0].save(tmp_path / "state")
    with pytest.raises(
        locc.CheckpointError, match=r"is \[6\], .* in the file and \[1\], .* here; .*one step"
    ):
        programs[1].load(tmp_path / "state")
    programs[1].step(x, y)
    programs[1].load(tmp_path / "state")
    for program in programs:
        program.step(x, y)
    assert same(*(snapshot(program.model) for program in programs))


@pytest.fixture
def one_process() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def reentrant(layer: nn.Module) -> nn.Module:
    return Checkpointed(layer, reentrant=True)


@pytest.mark.usefixtures("one_process")
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (synchronised, "the model itself fails .*SyncBatchNorm expected input tensor to be on GPU"),
        (reentrant, r"use_reentrant=True, at .*test_real_modules\.py:\d+.*; pass use_reentrant=False"),
    ],
)
def test_what_cannot_work_says_what_to_do(kind: Callable[[nn.Linear], nn.Module], message: str) -> None:
    model, (x, _) = network(kind), batch(dtype=torch.float64)
    before = snapshot(model)
    for method in ("bp", "dgl"):
        with pytest.raises(locc.CaptureError, match=message):
            locc.compile(model, method, SPLITS, example_inputs=x)
    assert same(before, snapshot(model))


# ---- Hugging Face ------------------------------------------------------------------------------


class Wrapped(nn.Module):
    """Hands everything on to the model that it holds, as peft's does."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.base = model

    @property
    def config(self) -> Any:
        return self.base.config

    def get_base_model(self) -> nn.Module:
        return self.base

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.base(*args, **kwargs)


def _linear(layer: Any) -> nn.Linear:
    """Return what one of GPT-2's own layers computes, as `nn.Linear`."""
    found = nn.Linear(*layer.weight.shape)
    with torch.no_grad():
        found.weight.copy_(layer.weight.T), found.bias.copy_(layer.bias)
    return found


@pytest.mark.skipif(not hf.HAS_TRANSFORMERS, reason="needs transformers")
def test_hugging_face_with_a_cache_checkpoints_and_adapters() -> None:
    torch.manual_seed(0)
    inner = hf.gpt2_with_cache().requires_grad_(False)
    for block in inner.transformer.h:
        block.mlp.c_fc = Adapter(_linear(block.mlp.c_fc))
    inner.gradient_checkpointing_enable()
    model = Wrapped(inner).double().train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    eager = copy.deepcopy(model)
    tokens = torch.randint(hf.VOCABULARY, (3, 5), generator=torch.Generator().manual_seed(0))
    x = {"input_ids": tokens, "labels": tokens}
    program = locc.compile(
        model,
        "bp",
        ["base.transformer.h.0"],
        loss="model",
        example_inputs=x,
        optimizer=sgd(),
        tied="owner",
        verify=False,
    )
    optimizer = sgd()([p for p in eager.parameters() if p.requires_grad])
    for _ in range(2):
        program.step(x)
        optimizer.zero_grad()
        eager(**x).loss.backward()
        optimizer.step()
    assert gap(model, eager) < 1e-12


class Paired(nn.Module):
    """Passes a list on, as the blocks of SelecSLS do."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Any) -> list[Tensor]:
        x = x if isinstance(x, list) else [x, x]
        return [self.one(x[0]).tanh() + x[1], self.two(x[1])]


class Chained(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features, self.head = nn.Sequential(Paired(), Paired(), Paired()), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.cat(self.features(x), 0).view(2, -1, 6).sum(0))


def test_lists_of_tensors_cross_cuts_part_by_part() -> None:
    x, y = torch.randn(4, 6, dtype=torch.float64), torch.tensor([0, 1, 2, 0])
    assert support.gap(Chained(), ["features.0", "features.1"], x, y) < 1e-12
