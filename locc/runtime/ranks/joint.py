"""What the ranks of a program do together: join, share out the modules, and make the program whole again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn

from locc.errors import LoccError
from locc.facts import graph_hash, graph_text
from locc.facts.names import Names
from locc.ir import TrainingGraph
from locc.ir.state import State, states
from locc.losses import judged
from locc.lower.inference import inference
from locc.runtime.learner import Learner
from locc.runtime.progress import Progress
from locc.runtime.ranks.ranks import Ranks


def join(
    ir: TrainingGraph,
    timeout: float,
    replicas: int,
    facts: Mapping[str, Any],
    seed: int,
    check: Callable[[int], None],
) -> tuple[Ranks | None, int]:
    """Take this process's place among the ranks, each with the tensors and the seed of rank 0.

    `check` refuses a number of processes before they connect; `facts` have to be those of rank 0, beside the
    graph.

    Returns:
        The place, None where this process is alone, and the seed.

    Raises:
        LoccError: the ranks run different programs.
    """
    ranks = Ranks.join(timeout, replicas, check)
    if ranks is None:
        return None, seed
    text, hashed = graph_text(ir).splitlines(), graph_hash(ir)
    if len(set(ranks.gathered(hashed))) > 1:
        every = zip_longest(*ranks.gathered(text), fillvalue="")
        line = next(number for number, one in enumerate(every) if len(set(one)) > 1)
        ranks.agree({"what differs first in graph or model": "".join(text[line : line + 1])})
    ranks.agree(facts)
    ranks.share([(tensor, 0) for tensor in _tensors(ir.root)])
    return ranks, ranks.told(seed)


def check_size(ir: TrainingGraph, size: int, replicas: int, stages: Sequence[Sequence[str]] | None) -> None:
    """Refuse what a number of processes does not go with.

    Raises:
        LoccError: there are more than modules and replicas of them, or stages are none of the program's: not
            every module once, in order, for as many ranks.
    """
    if size % replicas:
        raise LoccError(
            f"{size} processes were started, and replicas={replicas} of each stage do not come to that "
            f"number; start a multiple of {replicas}"
        )
    names = [module.name for module in ir.modules]
    most = len(names) * replicas
    if size > most:
        of_each = "" if replicas == 1 else f", of which replicas={replicas} each"
        raise LoccError(
            f"{size} processes were started, and the program has {len(names)} modules{of_each}: "
            f"start at most {most}, or split the model in more places"
        )
    if stages is None:
        return
    if [name for stage in stages for name in stage] != names or not all(stages):
        raise LoccError(f"stages={stages}: give every module once, in order, none empty: {names}")
    if len(stages) * replicas != size:
        raise LoccError(f"stages={stages} is for {len(stages) * replicas} ranks, and {size} were started")


def place(ranks: Ranks, ir: TrainingGraph, stages: Sequence[Sequence[str]], device: torch.device) -> None:
    """Give each rank its modules, and open the connections between ranks."""
    path = inference(ir, partial(judged, ir.loss_function))
    ranks.place(ir, path, [list(stage) for stage in stages], device)
    if ranks.width > 1:
        users = _users(ir, ranks)
        ranks.replicate([b for b in ir.root.buffers() if _owner(users, b) in ranks.owners])


def forget(ranks: Ranks, learners: Mapping[str, Learner]) -> None:
    """Let go of the optimizer state of what other ranks train."""
    for owner, learner in learners.items():
        if not ranks.owns(owner):
            learner.optimizer.state.clear()
            learner.clear()


def leave(ranks: Ranks, ir: TrainingGraph) -> None:
    """Let go of the memory of what only other ranks use; whoever asks for it is told that it is not here."""
    users = _users(ir, ranks)
    every = _tensors(ir.root)
    away = [t for t in every if id(t) in users and not any(ranks.owns(o) for o in users[id(t)])]
    known = set(map(id, away))
    ranks.away.leave(away, [t for t in every if id(t) not in known])
    if not ranks.guards:
        model = ir.root.model
        ranks.guards = [
            model.register_forward_pre_hook(ranks.check_whole),
            model.register_state_dict_pre_hook(ranks.check_whole),
        ]


def gather(ranks: Ranks, ir: TrainingGraph, lead: bool = False) -> None:
    """Take over what the other ranks have trained; all ranks call it.

    With `lead` rank 0 alone does, until `leave`; for the others nothing changes.
    """
    if ranks.leads or not lead:
        ranks.away.back()
    held = dict(states(ir.root))
    if held:
        shapes = {path: state.value.shape for path, state in held.items()}
        for rank, theirs in enumerate(ranks.gathered(shapes)):
            for path, state in held.items():
                if ranks.first(state.owner) == rank and state.value.shape != theirs[path]:
                    state.value = torch.empty(
                        theirs[path], dtype=state.value.dtype, device=state.value.device
                    )
    source = homes(ranks, ir)
    ranks.share([(t, source[id(t)]) for t in _tensors(ir.root)])
    if not lead:
        ranks.stale = False
        while ranks.guards:
            ranks.guards.pop().remove()


def count(ranks: Ranks, progress: Progress, steps: int, loss_here: bool, device: torch.device) -> int:
    """Take over the sums of the objectives that the other ranks compute; all ranks call it.

    Where each has trained on as many batches as it could, these count as sums over those of rank 0.

    Returns:
        The steps of rank 0.
    """
    own = {n: v.cpu() for n, v in progress.sums.items() if _counts(ranks, n, loss_here)}
    every = ranks.gathered((own, progress.batches, steps))
    _, progress.batches, steps = every[0]
    found = {
        n: v if batches == progress.batches else v * (progress.batches / batches)
        for theirs, batches, _ in every
        for n, v in theirs.items()
    }
    first = {"loss": found["loss"]} if "loss" in found else {}
    progress.sums = {n: v.to(device) for n, v in (first | found).items()}
    return steps


def homes(ranks: Ranks, ir: TrainingGraph) -> dict[int, int]:
    """Return the rank that has each parameter and buffer, by id; of what no module uses, rank 0."""
    users = _users(ir, ranks)
    return {id(t): ranks.first(_owner(users, t)) for t in _tensors(ir.root)}


def lent(ranks: Ranks, ir: TrainingGraph) -> list[tuple[Tensor, int]]:
    """Return what the inference path reads on another rank than the one that trains it, with that one."""
    users = _users(ir, ranks)
    found = []
    for tensor in _tensors(ir.root):
        if len({ranks.homes[owner] for owner in users.get(id(tensor), ())}) > 1:
            found.append((tensor, ranks.first(_owner(users, tensor))))
    return found


def _counts(ranks: Ranks, name: str, loss_here: bool) -> bool:
    owner = name.rpartition(".")[0]
    return ranks.owns(owner) if owner else loss_here


def _tensors(root: nn.Module) -> list[Tensor]:
    return list({id(t): t for t in (*root.parameters(), *root.buffers())}.values())


def _owner(users: Mapping[int, tuple[str, ...]], tensor: Tensor) -> str:
    return users.get(id(tensor), ("",))[0]


def _users(ir: TrainingGraph, ranks: Ranks) -> dict[int, tuple[str, ...]]:
    """Return who uses each parameter and buffer, by id: who trains it first."""
    names = Names.of(ir)
    found = {
        key: held.owners
        for part in (names.parameters, names.buffers)
        for key, held in part.items()
        if held.owners
    }
    for owner in ir.owners:
        for parameter in ir.parameters(owner).values():
            found[id(parameter)] = (owner, *found.get(id(parameter), ()))
    for module in ir.root.modules():
        if isinstance(module, State):
            found |= {id(buffer): (module.owner,) for buffer in module.buffers()}
    for owner, tensors in ranks.path.tensors.items() if ranks.path is not None else ():
        for tensor in tensors:
            found[id(tensor)] = (*found.get(id(tensor), ()), owner)
    return found
