"""The verbs that add to a training graph: nodes, owners, networks, and the four ops."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn

from locc.errors import GraphError, MethodError
from locc.ir import ops
from locc.ir.captured import owned_tensor
from locc.ir.infer import VariesError, infer
from locc.ir.spec import Spec, TensorSpec
from locc.ir.view import DATA, Owner, View


@dataclass
class Writer(View):
    """A training graph to which one can add."""

    @contextmanager
    def making(self, name: str) -> Iterator[None]:
        """Attribute the nodes created inside to the pass `name`."""
        before, self._making = self._making, name
        try:
            yield
        finally:
            self._making = before

    def emit(
        self,
        owner: str,
        function: Callable[..., Any],
        *args: Any,
        role: str = "compute",
        name: str | None = None,
        spec: Spec = None,
        **kwargs: Any,
    ) -> fx.Node:
        """Add a call of `function` to the owner's program and return its node.

        The spec is found by trying `function` on a few samples; one that is given is a check, and stands
        in where that tells nothing (it reads the target, say).

        Raises:
            GraphError: the owner does not exist, or the given spec is not that of the result.
        """
        return self._place("call_function", function, args, kwargs, owner, role, name, spec)

    def call(
        self, owner: str, path: str, *args: Any, role: str = "forward", spec: Spec = None, **kw: Any
    ) -> fx.Node:
        """Add a call of the submodule at `path` (as `add_module` returned it); for `spec` see `emit`."""
        return self._place("call_module", path, args, kw, owner, role, None, spec)

    def read(self, owner: str, path: str, role: str = "parameter", name: str | None = None) -> fx.Node:
        """Add a read of the parameter, buffer or module at `path`; one node for each owner and path."""
        found: fx.Node
        for found in self.graph.nodes:
            if found.op == "get_attr" and found.target == path and found.meta["owner"] == owner:
                return found
        tensor = owned_tensor(self.root, path)
        spec = TensorSpec.of(tensor) if isinstance(tensor, torch.Tensor) else None
        node = self._place("get_attr", path, (), {}, owner, role, name, spec, infers=False)
        self._first().prepend(node)
        return node

    def _first(self) -> fx.Node:
        first: fx.Node = next(n for n in self.graph.nodes if n.op != "placeholder")
        return first

    def _place(
        self,
        op: str,
        target: Any,
        args: Any,
        kwargs: Any,
        owner: str,
        role: str,
        name: str | None,
        spec: Spec,
        infers: bool = True,
    ) -> fx.Node:
        if owner not in self.owners:
            raise GraphError(f"pass '{self._making}' emits for owner '{owner}', which does not exist")
        if name is None and op == "call_function":
            # Not the function's own name: printed code would shadow the function.
            name = role if role != getattr(target, "__name__", "") else f"{role}_of_{owner}"
        try:
            found = infer(self.root, op, target, args, kwargs, self._tried) if infers else None
        except VariesError as error:
            raise VariesError(f"what pass '{self._making}' adds to module '{owner}' {error}") from error
        if found is not None and spec is not None and spec != found.spec:
            what = getattr(target, "__name__", target)
            raise GraphError(
                f"pass '{self._making}' says that '{what}' of '{owner}' gives {spec}, and it gives "
                f"{found.spec}; leave spec= out"
            )
        with self.graph.inserting_before(self._end()):
            node: fx.Node = self.graph.create_node(op, target, tuple(args), dict(kwargs), name)
        node.meta.update(owner=owner, role=role, made_by=self._making)
        node.meta["spec"] = spec if found is None else found.spec
        if infers and found is None:
            node.meta["untried"] = True
        elif found is not None:
            facts = {"random": found.random, "contracts": found.contracts}
            node.meta.update({name: True for name, holds in facts.items() if holds}, views=found.views)
        return node

    def _end(self) -> fx.Node:
        end: fx.Node = next(iter(reversed(self.graph.nodes)))
        return end

    def add_owner(self, name: str, serves: Owner, lr_scale: float = 1.0) -> Owner:
        """Add an auxiliary that trains alone, for the module `serves`."""
        if name in self.owners:
            raise GraphError(f"owner '{name}' exists twice")
        self.owners[name] = Owner(name, serves.index, auxiliary=True, lr_scale=lr_scale)
        return self.owners[name]

    def scale_lr(self, name: str, lr_scale: float) -> None:
        """Multiply the learning rate of an owner's optimizer."""
        self.owners[name] = replace(self.owners[name], lr_scale=lr_scale)

    def keep_norms(self, name: str) -> None:
        """Have each update of an owner leave its weights at the norm that they had before."""
        self.owners[name] = replace(self.owners[name], keeps_norms=True)

    def add_module(self, name: str, module: nn.Module) -> str:
        """Register an auxiliary network and return its path.

        Raises:
            MethodError: it is registered already; two places would train one network.
        """
        if any(module is held for held in self.root.aux.values()):
            raise MethodError(
                f"one network is given for two places, the second of them '{name}'; give a factory, or a "
                "network for each"
            )
        key = name.replace(".", "_")
        while key in self.root.aux:  # submodules `a.b_c` and `a_b.c` would share one name
            key += "_"
        self.root.aux[key] = module
        return f"aux.{key}"

    def stop_gradient(self, owner: str, value: fx.Node, role: str = "import") -> fx.Node:
        """Bring `value` into the owner's program without its tape; one node for each owner and value."""
        for user in value.users:
            if user.target is ops.stop_gradient and user.meta["owner"] == owner:
                return user
        if value.meta["owner"] in (owner, DATA) and role == "import" and value.op == "placeholder":
            return value
        name, spec = f"{value.name}_at_{owner}", value.meta.get("spec")
        return self._op(owner, ops.stop_gradient, (value,), role, name, spec)

    def objective(self, owner: str, scalar: fx.Node, name: str) -> fx.Node:
        """Declare `scalar` an objective of the owner, reported as `<owner>.<name>`.

        Raises:
            GraphError: `scalar` is no 0-d value.
        """
        self._check_scalar(scalar, f"makes '{scalar.name}' an objective of '{owner}'")
        node = self._op(owner, ops.objective, (scalar,), "objective", None, scalar.meta.get("spec"))
        node.meta["objective"] = f"{owner}.{name}"
        return node

    def _check_scalar(self, scalar: fx.Node, does: str) -> None:
        spec = scalar.meta.get("spec")
        if isinstance(spec, TensorSpec) and spec.shape:
            raise GraphError(
                f"pass '{self._making}' {does}, which is {spec} and must be 0-d; take its mean or sum"
            )

    def gradient(self, scalar: fx.Node, wrt: fx.Node) -> fx.Node:
        """Add d(scalar)/d(wrt) as a value, for any value of the scalar's owner that it is computed from.

        Raises:
            GraphError: `scalar` is not 0-d; `wrt` is another owner's, a parameter, or of whole numbers.
        """
        owner = scalar.meta["owner"]
        self._check_scalar(scalar, f"takes the gradient of '{scalar.name}'")
        if wrt.meta["owner"] != owner:
            raise GraphError(
                f"pass '{self._making}' takes a gradient of '{scalar.name}' of '{owner}' with respect to "
                f"'{wrt.name}' of '{wrt.meta['owner']}'; write leaf = ir.stop_gradient('{owner}', value, "
                "role='leaf'), compute the scalar from the leaf, and take its gradient"
            )
        if wrt.target is ops.carry:
            raise GraphError(
                f"pass '{self._making}' takes a gradient of '{scalar.name}' with respect to '{wrt.name}', "
                f"where a round begins; write leaf = ir.stop_gradient('{owner}', entry, role='leaf') and "
                "compute the scalar from the leaf"
            )
        if wrt.op == "get_attr":
            raise GraphError(
                f"pass '{self._making}' takes a gradient of '{scalar.name}' with respect to '{wrt.target}', "
                f"which an objective trains; as a value, write leaf = ir.stop_gradient('{owner}', parameter) "
                "and compute the scalar from the leaf"
            )
        if isinstance(spec := wrt.meta.get("spec"), TensorSpec) and not spec.differentiable:
            raise GraphError(f"'{wrt.name}' is {spec}, and a gradient exists of floating-point values only")
        return self._op(owner, ops.gradient, (scalar, wrt), "gradient", f"grad_{wrt.name}", spec)

    def _op(
        self, owner: str, op: Callable[..., Any], args: Any, role: str, name: str | None, spec: Spec
    ) -> fx.Node:
        return self._place("call_function", op, args, {}, owner, role, name, spec, infers=False)

    def assign(self, owner: str, state: str | fx.Node, value: fx.Node) -> fx.Node:
        """Set a state, parameter or buffer to `value` when the step (in a region: its round) is over.

        Under `accumulate=n` this happens in every step, as state belongs to the step and not to the update;
        parameters that an objective trains move in every n-th.

        Args:
            owner: whose it is.
            state: what `ir.state` returned, or the path of a parameter or buffer.
            value: of the same shape.

        Raises:
            GraphError: `state` is none, or `value` has another shape.
        """
        path = state if isinstance(state, str) else f"{state.meta.get('state')}.value"
        if not isinstance(owned_tensor(self.root, path), torch.Tensor):
            raise GraphError(
                f"pass '{self._making}' assigns to '{state}' of '{owner}'; give what ir.state returned, or "
                "the path of a parameter or buffer"
            )
        target = self.read(owner, path, role="state")
        found, wanted = value.meta.get("spec"), target.meta["spec"]
        if isinstance(found, TensorSpec) and found.shape != wanted.shape:
            raise GraphError(f"pass '{self._making}' assigns '{value.name}', {found}, to '{path}', {wanted}")
        return self._op(owner, ops.assign, (target, value), "assign", None, target.meta["spec"])
