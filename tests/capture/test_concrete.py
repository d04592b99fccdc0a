"""What the trace on fake tensors writes down: sizes, guards, regions, in-place ops, hooks, transforms."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from locc.capture import capture, export
from locc.errors import CaptureError, RunError
from locc.ir.captured import Inputs, Root
from zoo import find
from zoo.hf import HAS_TRANSFORMERS, gpt2_with_cache
from zoo.two import Two, sample, take, targets


def refuse(*args: Any) -> Any:
    raise CaptureError("refused here")


def allowed(found: Any) -> list[int]:
    return [b for b in range(1, 9) if found.signature.allows(b)]


def test_sizes_are_read_where_they_are_used() -> None:
    def between(m: Any, x: Tensor) -> Tensor:
        batch = x.size(0)
        return m.b(m.a(x).view(batch, 2, 3).transpose(1, 2).reshape(batch, -1) * (2 * batch))

    found = take(Two(between), sample())
    assert found.origin == "concrete"
    assert allowed(found) == list(range(1, 9))
    sizes = [n for n in found.training.nodes if n.target == "size"]
    assert [str(n.args[0]) for n in sizes][:2] == ["model_a", "transpose"]
    assert all(n.meta["stack"] == (("model", 0),) for n in sizes)


def test_operators_whose_functions_have_other_names_run_as_code() -> None:
    """`x ** y` is `Tensor.__pow__`, which calls itself `pow`, a name that `torch._tensor` does not have."""

    def between(m: Any, x: Tensor) -> Tensor:
        x = m.a(x)
        x **= x.size(0) ** 0
        return m.b(abs(x) ** 0.5 + -x / 2 + 2 / (3 + x**2))

    found = take(Two(between), sample())
    assert found.origin == "concrete"
    assert "torch._tensor" not in found.training.python_code("self").src


def test_a_branch_on_the_batch_size_becomes_a_guard() -> None:
    def between(m: Any, x: Tensor) -> Tensor:
        x = m.a(x)
        if x.size(0) > 2:
            x = x * 2
        return m.b(x)

    found = take(Two(between), sample())
    assert allowed(found) == [3, 4, 5, 6, 7, 8]
    assert found.signature.guards[0].text.startswith("B > 2, at ")
    assert "if x.size(0) > 2:" in found.signature.guards[0].text
    with pytest.raises(RunError, match="branches on a size"):
        found.signature.bind(Inputs((sample(2),), {}))


@pytest.mark.parametrize("example", [4, 1])
def test_a_branch_on_a_batch_of_one_is_not_lost(example: int) -> None:
    def between(m: Any, x: Tensor) -> Tensor:
        x = m.a(x)
        if x.size(0) == 1:  # a ShapeEnv takes this for impossible
            x = x * 2
        return m.b(x)

    found = take(Two(between), sample(example))
    assert 1 not in allowed(found)


def test_a_guard_against_one_is_lifted_where_one_was_tested() -> None:
    def between(m: Any, x: Tensor) -> Tensor:
        x = m.a(x)
        if x.size(0) == 1:
            x = x * 1
        elif x.size(0) == 5:
            x = x * 2
        return m.b(x)

    assert allowed(take(Two(between), sample())) == [1, 2, 3, 4, 6, 7, 8]


def test_a_loop_over_the_batch_pins_it() -> None:
    def between(m: Any, x: Tensor) -> Tensor:
        return torch.stack([m.b(m.a(x[i])) for i in range(x.size(0))])

    found = take(Two(between), sample(3))
    assert allowed(found) == [3]
    assert found.training.output_node().meta["spec"][0].batch_dim == 0


def test_a_model_of_one_batch_size_is_pinned() -> None:
    found = take(Two(lambda m, x: m.b(m.a(x).reshape(4, 6))), sample())
    assert allowed(found) == [4]
    with pytest.raises(RunError, match="fails at other batch sizes"):
        found.signature.bind(Inputs((sample(5),), {}))


def test_in_place_ops_are_kept_and_declared() -> None:
    def between(m: Any, x: Tensor) -> Tensor:
        x = m.a(x)
        flat = x.view(-1)
        flat += 1
        x[:, 0] = 0
        return m.b(x)

    found = take(Two(between), sample())
    nodes = {n.name: n for n in found.training.nodes}
    assert {"iadd", "setitem"} & set(targets(found.training)) == {"iadd", "setitem"} or "add_" in nodes
    changed = [n.meta["mutates"] for n in found.training.nodes if "mutates" in n.meta]
    assert nodes["model_a"] in changed[0]  # through the view


def test_the_result_of_an_in_place_op_replaces_its_operand() -> None:
    def between(m: Any, x: Tensor) -> Tensor:
        out = m.a(x)
        out += x
        return m.b(out)

    graph = take(Two(between), sample()).training
    (last,) = [n for n in graph.nodes if n.target == "model.b"]
    assert "mutates" in last.args[0].meta


def test_random_draws_are_declared() -> None:
    def between(m: Any, x: Tensor) -> Tensor:
        x = m.leaf(m.a(x))
        return m.b(x + torch.rand_like(x))

    found = take(Two(between, nn.Dropout(0.5)), sample())
    drawn = {n.name for n in found.training.nodes if n.meta.get("random")}
    assert drawn == {"model_leaf", "rand_like"}
    assert {n.name for n in found.inference.nodes if n.meta.get("random")} == {"rand_like"}


def test_no_grad_is_kept_op_by_op() -> None:
    def between(m: Any, x: Tensor) -> Tensor:
        x = m.a(x)
        with torch.no_grad():
            gate = torch.sigmoid(m.b(x) * 2)
        return m.b(x) * gate

    found = take(Two(between), sample())
    names = targets(found.training)
    assert "no_grad_mul" in names
    assert "no_grad_sigmoid" in names
    assert "detach" in names  # the closed module under no_grad


def test_autocast_is_kept_op_by_op_and_refused_around_a_closed_module() -> None:
    def between(m: Any, x: Tensor) -> Tensor:
        x = m.a(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            x = x @ m.b.weight
        return m.b(x.float())

    def around(m: Any, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return m.a(x)

    found = take(Two(between), sample())
    assert any(name.startswith("autocast_") for name in targets(found.training))
    with pytest.raises(CaptureError, match="'a' is called under autocast"):
        take(Two(around), sample())


def test_a_transform_between_modules_is_one_node_and_keeps_its_closure() -> None:
    def between(m: Any, x: Tensor) -> Tensor:
        x = m.a(x)
        center = x.mean(0) + m.b.bias
        return m.b(torch.vmap(lambda row: row * center)(x))

    found = take(Two(between), sample())
    assert found.origin == "concrete"
    (node,) = [n for n in found.training.nodes if n.name == "vmap"]
    assert len(node.all_input_nodes) == 2
    assert allowed(found) == list(range(1, 9))


def test_a_tensor_hook_between_modules_is_kept() -> None:
    def between(m: Any, x: Tensor) -> Tensor:
        x = m.a(x)
        if x.requires_grad:
            x.register_hook(lambda g: g * 3)
        return m.b(x)

    assert "with_hook" in targets(take(Two(between), sample()).training)


def test_an_attribute_set_in_forward_is_noted() -> None:
    def between(m: Any, x: Tensor) -> Tensor:
        m.hidden = m.a(x)
        return m.b(m.hidden)

    model = Two(between)
    found = take(model, sample())
    assert found.notes == ["the forward sets 'hidden', an attribute; the captured graph does not"]
    assert not hasattr(model, "hidden")


def test_a_state_in_an_attribute_is_refused() -> None:
    def between(m: Any, x: Tensor) -> Tensor:
        x = m.a(x) + getattr(m, "carry", 0.0)
        m.carry = x.mean(0).detach()
        return m.b(x)

    with pytest.raises(CaptureError, match=r"sets 'carry'.*register_buffer"):
        take(Two(between), sample())


class Puts(nn.Module):
    """Puts a tensor into a list, and returns another."""

    def forward(self, x: list[Tensor]) -> Tensor:
        x[0] = x[0] * 2
        return x[0] + 1


def test_what_a_leaf_puts_into_a_list_and_does_not_return_is_not_taken_for_what_was_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def between(m: Any, x: Tensor) -> Tensor:
        parts = [m.a(x)]
        return m.b(m.leaf(parts) + parts[0])

    assert take(Two(between, Puts()), sample()).origin == "export"
    monkeypatch.setattr(export, "trace", refuse)
    with pytest.raises(CaptureError, match=r"what 'leaf' put into its argument 'x\[0\]', .*is used at"):
        take(Two(between, Puts()), sample())


def test_a_list_that_outlives_the_call_and_is_changed_by_a_leaf_is_refused() -> None:
    def between(m: Any, x: Tensor) -> Tensor:
        return m.b(m.a(x) * m.leaf(m.kept))

    model = Two(between, Puts())
    model.kept = [torch.ones(6)]  # type: ignore[assignment]
    with pytest.raises(CaptureError, match=r"'leaf' changes its arguments and its next call gives another"):
        take(model, sample())
    assert torch.equal(model.kept[0], torch.ones(6))


def test_python_randomness_is_refused() -> None:
    import random

    with pytest.raises(CaptureError, match="Python's or NumPy's random numbers"):
        take(Two(lambda m, x: m.b(m.a(x) * random.random())), sample())


def test_a_shape_that_depends_on_data_is_refused() -> None:
    def between(m: Any, x: Tensor) -> Tensor:
        x = m.a(x)
        return m.b(x) * x[x > 0].sum()

    with pytest.raises(CaptureError, match="whose shape depends on data"):
        take(Two(between), sample())


@pytest.mark.parametrize("read", [float, int, bool, lambda t: t.tolist() * 2, lambda t: t.detach().numpy()])
def test_reading_a_value_is_refused_with_its_line(read: Any) -> None:
    def between(m: Any, x: Tensor) -> Tensor:
        x = m.a(x)
        read(x.sum())
        return m.b(x)

    with pytest.raises(CaptureError, match=r"(?s)steers the forward.*test_concrete.py:\d+: .*read"):
        take(Two(between), sample())


def test_a_layer_that_is_dropped_at_random_is_refused_and_one_that_never_is_runs() -> None:
    def dropping(p: float) -> Any:
        def between(m: Any, x: Tensor) -> Tensor:
            x = m.a(x)
            skip = m.training and torch.rand([]) < p
            return x if skip else m.b(x)

        return between

    assert "model.b" in targets(take(Two(dropping(0.0)), sample()).training)
    with pytest.raises(
        CaptureError, match=r"(?s)drawn at random, at .*test_concrete.py:\d+.*probability to 0"
    ):
        take(Two(dropping(0.5)), sample())


class Cached(nn.Module):
    """Names its cache and hands `use_cache` on among the rest, as some of Hugging Face's models do."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(use_cache=True)
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor, past_key_values: Any = None, **kwargs: Any) -> Any:
        x = self.b(self.a(x))
        return (x, DynamicCache()) if kwargs.get("use_cache", self.config.use_cache) else (x,)


class DynamicCache:
    def __init__(self) -> None:
        self.layers: list[Tensor] = []


def test_a_cache_is_switched_off_through_the_remaining_keywords() -> None:
    found = take(Cached(), sample())
    assert "captured with use_cache=False: training keeps no cache" in found.notes


class Observed(nn.Module):
    """Collects by a hook what a module inside its leaf returns, as Transformers does for router logits."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(6, 6), nn.Tanh())
        self.head, self.seen = nn.Linear(6, 4), []
        self.block[0].register_forward_hook(lambda module, args, output: self.seen.append(output))

    def forward(self, x: Tensor) -> Any:
        self.seen.clear()
        return {"logits": self.head(self.block(x)), "seen": tuple(self.seen)}


def test_what_hooks_inside_closed_modules_collect_is_refused_with_the_remedy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(export, "trace", refuse)
    with pytest.raises(CaptureError, match=r"'seen' with 1 parts, and 0 .*hooks inside of closed modules"):
        take(Observed(), sample())
    model = Observed()
    model.register_forward_hook(lambda module, args, output: output["seen"][0])
    with pytest.raises(CaptureError, match=r"IndexError.*hooks inside of closed modules"):
        take(model, sample())


class Routed(nn.Module):
    """Chooses its expert by the data, between two submodules."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(6, 1), nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)])

    def forward(self, x: Tensor) -> Tensor:
        return self.experts[int(self.gate(x).mean() > 0)](x)  # type: ignore[no-any-return]


def test_routing_by_data_is_refused_with_the_module_that_would_keep_it_inside() -> None:
    def between(m: Any, x: Tensor) -> Tensor:
        return m.b(m.leaf(m.a(x)))

    model = Two(between, nn.Sequential(Routed(), nn.Tanh()))
    assert take(model, sample(), "model", "model.leaf").origin in ("fx", "concrete")
    with pytest.raises(CaptureError, match=r"'leaf.0' can keep it inside if no split lies within 'leaf.0'"):
        take(model, sample(), "model", "model.leaf", "model.leaf.0")


class OwnLoss(Two):
    def forward(self, x: Tensor, labels: Tensor) -> Any:  # type: ignore[override]
        kept = (labels >= 0).nonzero()
        return self.b(self.a(x))[kept].mean()


def test_a_shape_that_depends_on_labels_is_refused_with_the_loss_to_give_instead() -> None:
    with pytest.raises(CaptureError, match=r'leave these out of the inputs and give loss="cross_entropy"'):
        take(OwnLoss(lambda m, x: x), (sample(), torch.zeros(4, dtype=torch.long)))


def test_an_unregistered_parameter_is_refused() -> None:
    hidden = [nn.Linear(6, 6)]
    with pytest.raises(CaptureError, match="that the model does not register"):
        take(Two(lambda m, x: m.b(hidden[0](x))), sample())


def test_a_module_made_in_forward_is_traced_through() -> None:
    found = take(Two(lambda m, x: m.b(nn.ReLU()(m.a(x)))), sample())
    assert "relu" in targets(found.training)


def test_a_shared_block_is_one_module_called_three_times() -> None:
    case = find("shared_block")
    model = case.build()
    graph = capture(Root(model), Inputs.of(model, case.inputs()), frozenset({"model"})).training
    calls = [n.meta["stack"][-1] for n in graph.nodes if n.op == "call_module" and "blocks" in str(n.target)]
    assert calls == [("model.blocks.0", 0), ("model.blocks.0", 1), ("model.blocks.0", 2)]


def test_a_tied_parameter_goes_under_its_first_name() -> None:
    found = take(Two(lambda m, x: m.b(m.a(x)) @ m.a.weight), sample())
    (node,) = [n for n in found.training.nodes if n.op == "get_attr"]
    assert node.target == "model.a.weight"


OPENED = frozenset({"model", "model.transformer"})


@pytest.mark.skipif(not HAS_TRANSFORMERS, reason="needs transformers")
def test_training_goes_without_the_cache_that_a_model_would_keep() -> None:
    model = gpt2_with_cache()
    x = find("hf_gpt2").inputs()
    found = capture(Root(model), Inputs.of(model, x), OPENED)
    assert "captured with use_cache=False: training keeps no cache" in found.notes
    assert model.config.use_cache is True  # type: ignore[union-attr]
    tensors = found.signature.bind(Inputs.of(model, x))  # the call is still the user's
    output = found.output(*fx.GraphModule(found.root, found.training)(*tensors))
    assert output.past_key_values is None
    model.eval()
    eager = model(x)
    assert eager.past_key_values is not None
    output = found.output(*fx.GraphModule(found.root, found.inference)(*tensors))
    torch.testing.assert_close(output.logits, eager.logits)


@pytest.mark.skipif(not HAS_TRANSFORMERS, reason="needs transformers")
def test_a_cache_that_is_asked_for_is_refused_with_the_remedy() -> None:
    model = gpt2_with_cache()
    call = Inputs((find("hf_gpt2").inputs(),), {"use_cache": True})
    with pytest.raises(CaptureError, match=r"DynamicCache.*use_cache"):
        capture(Root(model), call, OPENED)


def test_an_op_that_returns_its_operand_is_no_news_about_the_operand() -> None:
    def between(m: Any, x: Tensor) -> Tensor:
        batch = x.size(0)  # keeps proxies out
        x = m.a(x)
        y = m.leaf(x.contiguous())
        return m.b((x + y).view(batch, -1))

    graph = take(Two(between), sample()).training
    (add,) = [n for n in graph.nodes if n.name == "add"]
    assert [str(a) for a in add.args] == ["model_a", "model_leaf"]


def test_a_leaf_that_changes_its_input_is_what_later_uses_see() -> None:
    def between(m: Any, x: Tensor) -> Tensor:
        batch = x.size(0)
        x = m.a(x)
        m.leaf(x)
        return m.b(x.view(batch, -1))

    graph = take(Two(between, nn.ReLU(inplace=True)), sample()).training
    (view,) = [n for n in graph.nodes if n.target == "view"]
    assert str(view.args[0]) == "model_leaf"
    (leaf,) = [n for n in graph.nodes if n.name == "model_leaf"]
    assert [str(n) for n in leaf.meta["mutates"]] == ["model_a"]
