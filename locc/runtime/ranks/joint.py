"""What the ranks of a program do together: join, share out the modules, and make the program whole again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from locc.errors import LoccError
from locc.facts import graph_hash
from locc.facts.names import Names
from locc.ir import TrainingGraph
from locc.ir.state import State, states
from locc.runtime.learner import Learner
from locc.runtime.progress import Progress
from locc.runtime.ranks.ranks import Ranks


def join(ir: TrainingGraph, timeout: float, replicas: int, steps: int, seed: int) -> tuple[Ranks | None, int]:
    """Take this process's place among the ranks, each with the tensors and the seed of rank 0.

    Returns:
        The place, None where this process is alone, and the seed.

    Raises:
        LoccError: there are more ranks than modules and replicas of them, or they run different programs.
    """
    ranks = Ranks.join(timeout, replicas)
    if ranks is None:
        return None, seed
    if ranks.size % replicas:
        raise LoccError(
            f"{ranks.size} processes were started, and replicas={replicas} of each stage do not come to that "
            f"number; start a multiple of {replicas}"
        )
    most = len(ir.modules) * replicas
    if ranks.size > most:
        of_each = "" if replicas == 1 else f", of which replicas={replicas} each"
        raise LoccError(
            f"{ranks.size} processes were started, and the program has {len(ir.modules)} modules{of_each}: "
            f"start at most {most}, or split the model in more places"
        )
    ranks.agree({"the program's graph": graph_hash(ir), "steps done": steps})
    ranks.share([(tensor, 0) for tensor in _tensors(ir.root)])
    return ranks, ranks.told(seed)


def check_stages(ir: TrainingGraph, stages: Sequence[Sequence[str]], ranks: Ranks) -> None:
    """Refuse stages that are none of the program's.

    Raises:
        LoccError: they are not every module once, in order, for as many ranks.
    """
    wanted = len(stages) * ranks.width
    names = [module.name for module in ir.modules]
    if [name for stage in stages for name in stage] != names or not all(stages):
        raise LoccError(f"stages={stages}: give every module once, in order, none empty: {names}")
    if wanted != ranks.size:
        raise LoccError(f"stages={stages} is for {wanted} ranks, and {ranks.size} were started")


def place(ranks: Ranks, ir: TrainingGraph, stages: Sequence[Sequence[str]], device: torch.device) -> None:
    """Give each rank its modules, and open the connections between ranks."""
    ranks.place(ir, [list(stage) for stage in stages], device)
    if ranks.width > 1:
        owners = _owners(ir)
        ranks.replicate([b for b in ir.root.buffers() if owners.get(id(b)) in ranks.owners])


def forget(ranks: Ranks, learners: Mapping[str, Learner]) -> None:
    """Let go of the optimizer state of what other ranks train."""
    for owner, learner in learners.items():
        if not ranks.owns(owner):
            learner.optimizer.state.clear()
            learner.clear()


def gather(ranks: Ranks, ir: TrainingGraph, progress: Progress | None, loss_here: bool) -> None:
    """Take over what the other ranks have trained, and the sums of their objectives; all ranks call it."""
    held = dict(states(ir.root))
    if held:
        shapes = {path: state.value.shape for path, state in held.items()}
        for rank, theirs in enumerate(ranks.gathered(shapes)):
            for path, state in held.items():
                if ranks.first(state.owner) == rank and state.value.shape != theirs[path]:
                    state.value = torch.empty(
                        theirs[path], dtype=state.value.dtype, device=state.value.device
                    )
    owners = _owners(ir)
    ranks.share([(t, ranks.first(owners.get(id(t), ""))) for t in _tensors(ir.root)])
    if progress is not None:
        own = {n: v.cpu() for n, v in progress.sums.items() if _counts(ranks, n, loss_here)}
        found = {n: v for theirs in ranks.gathered(own) for n, v in theirs.items()}
        first = {"loss": found["loss"]} if "loss" in found else {}
        progress.sums = {n: v.to(_device(ir.root)) for n, v in (first | found).items()}
    ranks.stale = False


def _counts(ranks: Ranks, name: str, loss_here: bool) -> bool:
    owner = name.rpartition(".")[0]
    return ranks.owns(owner) if owner else loss_here


def _device(root: nn.Module) -> torch.device:
    return next((p.device for p in root.parameters()), torch.device("cpu"))


def _tensors(root: nn.Module) -> list[Tensor]:
    return list({id(t): t for t in (*root.parameters(), *root.buffers())}.values())


def _owners(ir: TrainingGraph) -> dict[int, str]:
    """Return whose each parameter and buffer is, by id."""
    names = Names.of(ir)
    found = {
        key: held.owners[0]
        for part in (names.parameters, names.buffers)
        for key, held in part.items()
        if held.owners
    }
    for owner in ir.owners:
        found |= {id(p): owner for p in ir.parameters(owner).values()}
    for module in ir.root.modules():
        if isinstance(module, State):
            found |= {id(buffer): module.owner for buffer in module.buffers()}
    return found
