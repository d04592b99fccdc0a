"""A compiled model outside of its steps: what is known of it, where it is, what it computes, how it moves."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterable
from typing import Any, Self

import torch
from torch import Tensor, nn

from locc.errors import LoccError, RunError
from locc.facts import Certificate
from locc.facts.traffic import by_role
from locc.ir import Inputs, Phase, Root, TrainingGraph
from locc.runtime.built import Built
from locc.runtime.folded import Folded
from locc.runtime.member import Member
from locc.runtime.offload import Offload
from locc.runtime.ranks import Ranks
from locc.runtime.settings import Settings


class Placed(nn.Module):
    """What `Compiled` is outside of its steps."""

    def __init__(self, root: Root, method: str, settings: Settings) -> None:
        super().__init__()
        self.root = root
        self.method = method
        self.settings = settings
        self.member: Member | None = None
        self._built: Built | None = None
        self._folded: Folded | None = None
        self._turn = threading.Lock()

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Refuse: a program holds code, which does not travel.

        Raises:
            RunError: always.
        """
        raise RunError(
            "a program holds code and cannot be pickled: program.save(path) keeps its state, and "
            "program.load(path) puts that into a program that is compiled the same way"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Copy as any module does; the copy runs, but does not train (see `step`)."""
        twin: Self = object.__new__(type(self))
        memo[id(self)] = twin
        memo[id(self._turn)] = threading.Lock()
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin

    @property
    def built(self) -> Built:
        """What compilation yielded.

        Raises:
            RunError: there were no example inputs and no step yet.
        """
        if self._built is None:
            raise RunError(
                "the program is not complete yet: pass example_inputs to compile, or run a step first"
            )
        return self._built

    @property
    def model(self) -> nn.Module:
        """The user's model."""
        return self.root.model

    @property
    def ir(self) -> TrainingGraph:
        """The training graph; prints as readable Python."""
        return self.built.ir

    @property
    def certificate(self) -> Certificate:
        """What was proved of the program.

        Raises:
            RunError: the program was compiled with verify=False.
        """
        if self.built.certificate is None:
            raise RunError("the program was compiled with verify=False; call locc.verify(program)")
        return self.built.certificate

    @property
    def auxiliaries(self) -> dict[str, dict[str, nn.Module]]:
        """The auxiliary networks by module and role: {"layer1": {"head": ...}}.

        Roles: "head", "sim_head", "inverse", "synthesiser", "bridge", "encoder", "feedback". Where a module
        has several of a role, they are "head", "head_2", ... in the graph's order.
        """
        return by_role(self.ir)

    @property
    def loss_function(self) -> Callable[[Any, Any], Tensor]:
        """The user's loss, of (output, target)."""
        return self.ir.loss_function

    @property
    def phases(self) -> tuple[Phase, ...]:
        """The phases that `fit` runs; empty when all owners train in every step."""
        return self.built.phases

    @property
    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """The optimizer of each owner that trains."""
        return {name: learner.optimizer for name, learner in self.built.learners.items()}

    @property
    def schedulers(self) -> dict[str, Any]:
        """The learning-rate scheduler of each owner that has one."""
        return self.built.schedulers

    @property
    def ranks(self) -> Ranks | None:
        """The processes that train this program, if there are several."""
        return None if self.member is None else self.member.ranks

    def whole(self) -> None:
        """Refuse to go on where other ranks hold newer parameters than this one.

        Raises:
            RunError: they do.
        """
        if self.ranks is not None:
            self.ranks.check_whole()

    def moved(self, value: Any) -> Any:
        """Return a batch, or a part of one, with its tensors where the model computes."""
        return moved_to(value, self.device)

    @property
    def device(self) -> torch.device:
        """Where the model computes: where its first parameter is, unless its modules visit a device."""
        if self._visits is not None and self._visits.device is not None:
            return self._visits.device
        found = next(self.root.model.parameters(), None)
        return torch.device("cpu") if found is None else found.device

    @property
    def _visits(self) -> Offload | None:
        """What brings modules to a device where the model is not, if they go there."""
        offload = None if self._built is None else self._built.executor.offload
        return None if offload is None or offload.device is None else offload

    # ---- inference --------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the inference path.

        Raises:
            RunError: with `offload="cpu"`, in train mode: that path is the one of eval mode.
        """
        self.whole()
        offload = self._visits
        if self._built is None or not (self._built.ir.folded or offload):
            return self.root.model(*args, **kwargs)
        if offload is not None and self.model.training:
            raise RunError(
                "with offload='cpu' a program computes outside of a step in eval mode alone; call "
                "program.eval() first"
            )
        if self._folded is None:
            object.__setattr__(self, "_folded", Folded(self.root, self._built.ir, offload))
        assert self._folded is not None
        if offload is not None:
            args, kwargs = self.moved((args, kwargs))
        return self._folded(*args, **kwargs)

    @property
    def network(self) -> nn.Module:
        """What inference runs: the model, or of a method that folds it, a module of the parts that are kept.

        It shares the program's parameters; of a folded network, `copy.deepcopy` of it is one to train end to
        end beside the method, with as many parameters.

        Raises:
            RunError: there were no example inputs and no step yet.
        """
        self.whole()
        return Folded(self.root, self.ir) if self.ir.folded else self.model

    def predict(self, x: Any) -> Any:
        """Run the inference path on a batch as `step` takes it."""
        inputs = Inputs.of(self.model, self.moved(x))
        return self(*inputs.args, **inputs.kwargs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = {id(p): p for p in self.root.parameters()}
        if self._built is not None:
            for dtype in {p.dtype for p in before.values()}:
                moved = fn(torch.empty(0, dtype=dtype, device=next(self.root.parameters()).device))
                self._check_place(moved.device)
                if moved.dtype != dtype:
                    raise LoccError(
                        f"the program is compiled for {dtype}; cast the model before compiling it"
                    )
        self.whole()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        object.__setattr__(self, "_folded", None)  # it holds buffers, which a move replaces
        if self._built is not None:
            self._follow_device()
            if {id(p) for p in self.root.parameters()} != set(before):
                raise LoccError(
                    "moving the program replaced its parameters; move the model before compiling it"
                )
        return self

    def _follow_device(self) -> torch.device:
        """Take the optimizers to where the model is now, and return where that is."""
        device = self.device
        if self.built.executor.device != device:
            self._check_place(device)
            self.root.aux.to(device)
            self.built.executor.device = device
            _move_optimizer_state(self.optimizers.values())
        return device

    def _check_place(self, device: torch.device) -> None:
        if self.settings.backend == "cudagraphs" and device != self.built.executor.device:
            raise LoccError(
                f"backend='cudagraphs' records on {self.built.executor.device}, where the model was when it "
                f"was compiled, and it is asked to be on {device}; compile it there"
            )
        if self.built.executor.offload is not None and device.type != "cpu":
            raise LoccError(
                f"offload= keeps a model in the memory of the CPU, and the model is asked to be on {device}; "
                "leave it there, or compile it without offload="
            )

    def extra_repr(self) -> str:
        """Name the method and the modules."""
        if self._built is None:
            return f"method={self.method}, not complete: no example inputs yet"
        return f"method={self.method}, modules={[o.name for o in self.ir.modules]}"


def moved_to(value: Any, device: torch.device) -> Any:
    """Return a value that may be nested with its tensors on a device."""
    if isinstance(value, Tensor):
        return value if value.device == device else value.to(device, non_blocking=True)
    return torch.utils._pytree.tree_map_only(Tensor, lambda item: moved_to(item, device), value)


def _move_optimizer_state(optimizers: Iterable[torch.optim.Optimizer]) -> None:
    for optimizer in optimizers:
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
