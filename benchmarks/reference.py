"""What is a fact of a method: its program on a small reference network, and the operations of its steps.

Nothing is timed, so the same versions give the same facts.
"""

from __future__ import annotations

import math
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any

import torch
from rich.filesize import decimal
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

import locc
from locc.ir.state import states
from locc.ir.view import node_parameters
from locc.registry import load

BATCH = 100
BEFORE = ("altmin", "pair-proxy")
"""Methods whose modules end before the nonlinearity."""
MLP = "784-400-400-400-10 network of ReLUs"
CNN = "network of three 3x3 convolutions with ReLUs and a linear layer (1-32-32-32-10, 28x28 pixels)"
OWN = "what the method computes beside them"
_UNKNOWN = re.compile(r"cholesky|solve|svd|linalg_(eig|inv|lu|qr)")
"""Operators whose cost PyTorch's counter does not know."""


def network(name: str) -> tuple[nn.Module, Tensor]:
    """Return a reference network of three hidden parts, and a batch for it."""
    last: nn.Module
    if name == MLP:
        hidden: list[nn.Module] = [nn.Linear(a, b) for a, b in pairwise((784, 400, 400, 400))]
        last, x = nn.Linear(400, 10), torch.rand(BATCH, 784)
    else:
        hidden = [nn.Conv2d(a, 32, 3, stride, 1) for a, stride in ((1, 2), (32, 1), (32, 2))]
        last, x = nn.Sequential(nn.Flatten(), nn.Linear(32 * 7 * 7, 10)), torch.rand(BATCH, 1, 28, 28)
    return nn.Sequential(*(nn.Sequential(layer, nn.ReLU()) for layer in hidden), last), x


class Operations(TorchDispatchMode):
    """Counts the operations of matrix products and convolutions in a step, by owner and by part.

    The parts are the network, each kind of auxiliary network, and what the method computes beside them. A
    backward pass is counted with the part whose forward pass it is of.
    """

    def __init__(self, program: locc.Program) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.running, self.known = 0, True
        self.owners: Counter[str] = Counter()
        self.parts: Counter[str] = Counter()
        self._within: list[str] = []
        self._made: dict[int, str] = {}
        named = [("the network", m) for m in program.root.model.modules()]
        for networks in program.auxiliaries.values():
            named += list(networks.items())
        self._hooks = []
        for part, module in named:
            self._hooks += [
                module.register_forward_pre_hook(lambda *_, part=part: self._within.append(part)),
                module.register_forward_hook(lambda *_: self._within.pop() and None),
            ]

    def __exit__(self, *error: Any) -> None:
        """Stop counting."""
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        for hook in self._hooks:
            hook.remove()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator and count it."""
        result = func(*args, **(kwargs or {}))
        packet = func._overloadpacket
        if packet in flop_registry:
            found = flop_registry[packet](*args, **(kwargs or {}), out_val=result)
            self.running += found
            self.parts[self._part()] += found
        self.known &= not _UNKNOWN.search(packet.__name__)
        return result

    def _part(self) -> str:
        # Autograd numbers its nodes as they are made, just before their operators run.
        node = torch._C._current_autograd_node()  # type: ignore[attr-defined]
        if node is not None:
            return self._made.get(node._sequence_nr(), OWN)
        part = self._within[-1] if self._within else OWN
        self._made[torch.autograd._get_sequence_nr() - 1] = part
        return part

    def ran(self, instruction: Any, _: object) -> None:
        """Book what has run since the last instruction."""
        self.owners[instruction.owner] += self.running
        self.running = 0


@dataclass(frozen=True)
class Facts:
    """A method's program on a reference network, and the operations of a step in each phase."""

    network: str
    program: locc.Program
    steps: dict[str, Operations]

    def flows(self) -> Counter[tuple[str, ...]]:
        """Return the bytes in a batch of what passes between owners: (from, to, kind, type, direction)."""
        specs = {n.name: n.meta.get("spec") for n in self.program.ir.graph.nodes}
        found: Counter[tuple[str, ...]] = Counter()
        for f in self.program.certificate.flows:
            if f.producer != "data":
                kind = f.kind + f", age {f.staleness}" * (f.staleness > 0)
                parts = [s for s in tree_leaves(specs.get(f.value)) if s is not None]
                sizes = [math.prod(s.concrete(BATCH)) * s.dtype.itemsize for s in parts]
                found[f.producer, f.consumer, kind, f.spec, f.direction] += sum(sizes)
        return found

    def payload(self, direction: str) -> str:
        """Return what goes up, or down, between modules in a batch."""
        sizes: Counter[str] = Counter()
        for (_, _, kind, _, way), size in self.flows().items():
            sizes[kind] += size * (way == direction)
        return ", ".join(f"{kind} {decimal(size)}" for kind, size in sorted(sizes.items()) if size) or "none"

    def flops(self, owner: str | None = None) -> str:
        """Return the operations of a step in each phase, of all or one owner, in units of a step of `bp`."""
        return self._in_steps_of_bp(
            {p: s.owners.total() if owner is None else s.owners[owner] for p, s in self.steps.items()}
        )

    def dear(self) -> dict[str, str]:
        """Return the operations of each part, where a step takes over three times those of `bp`."""
        base, steps = facts("bp", self.network).steps["all"].owners.total(), self.steps.values()
        if not any(s.known and s.owners.total() > 3 * base for s in steps):
            return {}
        return {
            part: self._in_steps_of_bp({p: s.parts[part] for p, s in self.steps.items()})
            for part in dict.fromkeys(part for s in steps for part in s.parts)
        }

    def _in_steps_of_bp(self, found: Mapping[str, int]) -> str:
        base = facts("bp", self.network).steps["all"].owners.total()
        shown = {p: f"{n / base:.2f}" if self.steps[p].known else "not counted" for p, n in found.items()}
        return ", ".join(text if p == "all" else f"{p} {text}" for p, text in shown.items())

    def table_one(self) -> dict[str, str]:
        """Return the entries of the survey's Table I, and those that they follow from."""
        c = self.program.certificate
        modules = [o for o in c.owners if not o.auxiliary]
        return {
            "family": load(self.program.method).family,
            "auxiliary model": yes(c.table.auxiliary_model),
            "whole forward pass": yes(c.table.forward_pass),
            "backward pass": c.table.backward_pass,
            "payload up": self.payload("up"),
            "payload down": self.payload("down"),
            "forward-locked": f"{sum(o.forward_locked for o in modules)} of {len(modules)}",
            "update-locked": f"{sum(o.update_locked for o in modules)} of {len(modules)}",
            "backward-locked": f"{sum(o.backward_locked for o in modules)} of {len(modules)}",
            "pipeline-exact": yes(c.pipeline_exact),
            "verdict": c.verdict,
        }

    def costs(self) -> dict[str, str]:
        """Return what the method adds to the network, and what a step costs."""
        ir, root, memory = self.program.ir, self.program.root, self.program.certificate.memory
        base = facts("bp", self.network).program.certificate.memory
        lasting = [state for _, state in states(root)]
        own = {id(t) for m in (root.model, *lasting) for t in (*m.parameters(), *m.buffers())}
        used = {id(p): p for n in ir.inference.nodes for _, p in node_parameters(ir.root, n)}
        kept = size(p for i, p in used.items() if i not in own)
        return {
            "kept at inference": f"the network, and of the method {kept}" if ir.folded else "the network",
            "auxiliary parameters": size(p for p in root.aux.parameters() if id(p) not in own),
            "not trained": size(b for b in root.aux.buffers() if id(b) not in own),
            "kept between steps": size(state.value for state in lasting),
            "flops": self.flops(),
            "peak memory": f"{memory.peak / base.peak:.2f}" if memory and base else "not known",
        }


@cache
def facts(name: str, on: str | None = None) -> Facts:
    """Compile a method on the MLP, or on convolutions where it is undefined there, and take its steps."""
    if on is None:
        try:
            return facts(name, MLP)
        except locc.MethodError:
            return facts(name, CNN)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore", locc.LoccWarning)
        torch.manual_seed(0)
        (model, x), y = network(on), torch.randint(10, (BATCH,))
        splits = [f"{k}.0" if name in BEFORE else str(k) for k in range(3)]
        program = locc.compile(model, name, splits, example_inputs=x, seed=0)
        steps: dict[str, Operations] = {}
        phases: list[str | None] = [p.name for p in program.phases]
        for phase in phases or [None]:
            program.phase = phase
            with Operations(program) as counted:
                program.built.executor.observe = counted.ran
                program.step(x, y)
            steps[phase or "all"] = counted
    return Facts(on, program, steps)


def size(tensors: Iterable[Tensor]) -> str:
    """Return how many numbers tensors hold, and in how many bytes."""
    found = list(tensors)
    return f"{sum(t.numel() for t in found):,} ({decimal(sum(t.nbytes for t in found))})" if found else "none"


def yes(value: bool) -> str:
    """Return a word."""
    return "yes" if value else "no"
