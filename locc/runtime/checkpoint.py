"""Saving and resuming, bit for bit: safetensors, with JSON in its header.

One file, or a folder with one for each rank, holds the parameters and buffers of the model and of the
auxiliaries, the optimizers, the schedulers, gradients of an accumulation under way, the counters, the random
state, and where a fit that is not over stands.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from locc.errors import CheckpointError
from locc.ir.memory import memory_of
from locc.ir.state import states
from locc.losses import NAMED
from locc.publishing import replacing
from locc.runtime import folder
from locc.runtime.mapped import Stored, read
from locc.runtime.plain import plain, restored
from locc.runtime.program import Compiled
from locc.runtime.progress import Progress
from locc.runtime.ranks import Ranks, forget, gather, homes, leave

FORMAT = 3


def save(program: Compiled, path: str | Path) -> None:
    """Write the program's state; what was saved at `path` before stays whole until the new one is complete.

    Among ranks (schedule "pipelined") all call it. Into a file rank 0 writes the state of all; into a folder,
    which all have to see, each rank its own part. Any number of ranks, or one process, can load either.

    Args:
        program: the program.
        path: a file; or a folder, by a path that ends in a slash, or in which a checkpoint is already.

    Raises:
        CheckpointError: the folder does not exist, a file cannot be written, or the state of an
            optimizer or a scheduler is not JSON.
    """
    ranks = program.ranks
    program.count()
    if folder.is_meant(path):
        _save_parts(program, Path(path))
        return
    path = Path(path)
    if ranks is None:
        _write(path, *_live(program))
        return
    with _on_rank_0(program, ranks):
        state, problem = _merged(program, ranks), None
        if state is not None:
            try:
                _write(path, *state)
            except CheckpointError as error:
                problem = str(error)
        problem = ranks.told(problem)
    if problem is not None:
        raise CheckpointError(problem)


def _save_parts(program: Compiled, path: Path) -> None:
    ranks = program.ranks
    tensors, header = _live(program, None if ranks is None else _share(program, ranks))
    digests = [_digest(tensors, "")]
    whole: dict[str, Any] | None = header
    if ranks is not None:
        whole, digests = _merged_header(header, ranks), ranks.gathered(digests[0] if tensors else None)
    if whole is not None:
        text, own = json.dumps(whole), [digest for digest in digests if digest is not None]
        sealed = json.dumps({"locc": text, "digest": _digest({}, text + "".join(own))})
        tensors["locc"] = torch.frombuffer(bytearray(sealed.encode()), dtype=torch.uint8)
    folder.write(path, tensors, program.steps, ranks)


@contextlib.contextmanager
def _on_rank_0(program: Compiled, ranks: Ranks) -> Iterator[None]:
    """Let rank 0 have what all ranks hold, and let go of it afterwards."""
    if not ranks.stale:
        yield
        return
    gather(ranks, program.ir, lead=True)
    try:
        yield
    finally:
        leave(ranks, program.ir)


def _merged(program: Compiled, ranks: Ranks) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Return the state of all ranks on rank 0, where the others hand in that of what they train."""
    own = _share(program, ranks)

    def wanted(name: str, tensor: Tensor) -> bool:
        return ranks.leads if name.startswith("state/") else own(name, tensor)

    tensors, header = _live(program, wanted)
    merged = _merged_header(header, ranks)
    found = ranks.collected({} if ranks.leads else tensors)
    if found is None or merged is None:
        return None
    return tensors | {name: t for theirs in found for name, t in theirs.items()}, merged


def _merged_header(header: dict[str, Any], ranks: Ranks) -> dict[str, Any] | None:
    """Return the header of all ranks on rank 0, None elsewhere."""
    parts = ("optimizers", "schedulers")
    found = ranks.collected(
        {key: {o: held for o, held in header[key].items() if ranks.answers(o)} for key in parts}
    )
    if found is None:
        return None
    return header | {key: {o: h for theirs in found for o, h in theirs[key].items()} for key in parts}


def _share(program: Compiled, ranks: Ranks) -> Callable[[str, Tensor], bool]:
    """Return what tells whether this rank is the one to hand in a tensor of the state."""
    numbers = {str(i): ranks.answers(owner) for i, owner in enumerate(program.ir.owners)}
    source = homes(ranks, program.ir)

    def own(name: str, tensor: Tensor) -> bool:
        kind, number, *_ = name.split("/")
        if kind in ("optimizer", "grad"):
            return numbers[number]
        return source[id(tensor)] == ranks.rank if kind == "state" else ranks.leads

    return own


def _write(path: Path, tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
    if not path.parent.is_dir():
        raise CheckpointError(f"cannot save to '{path}': the folder '{path.parent}' does not exist")
    text = json.dumps(header)
    metadata = {"locc": text, "digest": _digest(tensors, text)}
    try:
        with replacing(path) as name:
            name.touch()
            mode = name.stat().st_mode  # what the umask says; safetensors writes files for the owner alone
            save_file(tensors, name, metadata=metadata)
            os.chmod(name, mode)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"cannot save to '{path}': {error}; a file that was there before is unharmed"
        ) from error


def load(program: Compiled, path: Path) -> None:
    """Read a state that `save` wrote into a program compiled in the same way.

    The loss is compared by its code, its constants and the values that it held when it was compiled. Of other
    objects that it holds only the type can be, and a warning names them.

    Raises:
        CheckpointError: the file is missing, torn, foreign or of another program; the program then
            stays as it was.
    """
    tensors, header = _read(path)
    program.gather()
    graph = graph_hash(program)
    if header["graph"] != graph:
        raise CheckpointError(
            f"'{path}' was saved by another program (method '{header['method']}', modules "
            f"{', '.join(header['owners'])}); this one is method '{program.method}', modules "
            f"{', '.join(program.ir.owners)}. Compile with the same model, splits and options"
        )
    _compare_losses(program, path, header["loss"])
    own, mine = _state(program)
    problem = next(_misfits(program, tensors.lying, header, own, mine), None)
    if problem is not None:
        raise CheckpointError(f"'{path}' does not fit this program: {problem}")
    try:
        _apply(program, tensors, header)
    except BaseException as error:
        _apply(program, own, mine)
        if isinstance(error, Exception):
            raise CheckpointError(
                f"'{path}' does not fit this program: {type(error).__name__}: {error}"
            ) from error
        raise


def _compare_losses(program: Compiled, path: Path, saved: dict[str, Any]) -> None:
    mine = program.built.loss
    if saved["python"] != mine.python:
        reason = f"it was compiled by Python {saved['python']}, and this is Python {mine.python}"
    elif saved["digest"] != mine.digest:
        raise CheckpointError(
            f"'{path}' was saved with another loss, {saved['name']}; this program has {mine.name}, whose "
            "code, constants or values held differ. Compile with the same loss"
        )
    elif not mine.opaque:
        return
    else:
        reason = f"only the type is compared of what it holds as {', '.join(mine.opaque)}"
    if saved["name"] not in NAMED:
        warnings.warn(
            f"whether the loss {mine.name} is that of '{path}' cannot be told: {reason}", stacklevel=4
        )


def _misfits(
    program: Compiled,
    tensors: Mapping[str, Tensor],
    header: dict[str, Any],
    own: Mapping[str, Tensor],
    mine: dict[str, Any],
) -> Iterator[str]:
    """Yield what keeps a saved state from being this program's."""

    def state(held: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {n: t for n, t in held.items() if n.startswith("state/")}

    fits = {f"state/{path}.value": held.fits for path, held in states(program.root)}
    for name in {**state(own), **state(tensors)}:
        a, b = own.get(name), tensors.get(name)
        path = name.removeprefix("state/")
        if a is None or b is None:
            yield f"tensor '{path}' is in {'the file' if a is None else 'the program'} only"
        elif a.dtype != b.dtype or not fits.get(name, a.shape.__eq__)(b.shape):
            yield (
                f"tensor '{path}' is {list(b.shape)}, {b.dtype} in the file and {list(a.shape)}, {a.dtype} "
                "here; if the model gives it its size at the first call, train one step and load then"
            )
    for key, what in (
        ("optimizers", "optimizers"),
        ("schedulers", "schedulers"),
        ("phases", "phases of training"),
    ):
        found, expected = _kinds(header, key), _kinds(mine, key)
        if found != expected:
            yield f"it was saved with the {what} {found or 'none'}, and this program has {expected or 'none'}"


def _kinds(header: dict[str, Any], key: str) -> Any:
    held = header[key]
    return {name: item["kind"] for name, item in held.items()} if isinstance(held, dict) else held


def graph_hash(program: Compiled) -> str:
    """Return a digest of the printed training graph."""
    return hashlib.blake2b(str(program.ir).encode(), digest_size=16).hexdigest()


def _state(program: Compiled) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return a copy of everything; of a program that has what waits on disk, it is there as well."""
    tensors, header = _live(program)
    offload = program.built.executor.offload
    return {n: t.clone() if offload is None else offload.copy(t) for n, t in tensors.items()}, header


def _live(
    program: Compiled, wanted: Callable[[str, Tensor], bool] | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors: dict[str, Tensor] = {}
    for name, tensor in _own(program).items():
        tensors[f"state/{name}"] = tensor
    groups: dict[str, Any] = {}
    for owner, learner in program.built.learners.items():
        state = learner.optimizer.state_dict()
        number = list(program.ir.owners).index(owner)
        groups[owner] = {
            "kind": type(learner.optimizer).__name__,
            "groups": plain(state["param_groups"], f"optimizer of '{owner}'"),
            "plain": {},
        }
        for index, values in state["state"].items():
            for key, value in values.items():
                if isinstance(value, Tensor):
                    tensors[f"optimizer/{number}/{index}/{key}"] = value
                else:
                    groups[owner]["plain"].setdefault(str(index), {})[key] = plain(
                        value, f"optimizer of '{owner}'"
                    )
        groups[owner]["pending"] = learner.pending
        for i, parameter in enumerate(learner.parameters):
            if learner.pending and parameter.grad is not None:
                tensors[f"grad/{number}/{i}"] = parameter.grad
    tensors["random/cpu"] = torch.get_rng_state()
    if program.device.type == "cuda":
        tensors["random/cuda"] = torch.cuda.get_rng_state(program.device)
    progress = None
    if program.progress is not None:
        progress, parts = program.progress.packed()
        tensors |= {f"progress/{name}": tensor for name, tensor in parts.items()}
    replay = {}  # not among ranks: what is kept there, and on its way, is none of one moment
    for number, (phase, workers) in enumerate(program.built.workers.items() if program.ranks is None else ()):
        kept: dict[str, Tensor] = {}
        replay[str(number)] = [phase, workers.packed(kept)]
        tensors |= {f"replay/{number}/{name}": tensor for name, tensor in kept.items()}
    header = {
        "format": FORMAT,
        "graph": graph_hash(program),
        "loss": dataclasses.asdict(program.built.loss),
        "method": program.method,
        "owners": list(program.ir.owners),
        "steps": program.steps,
        "epochs": program.epochs,
        "phase": program.phase,
        "warm": sorted(program.warm),
        "progress": progress,
        "seed": program.built.executor.seed,
        "replay": replay,
        "optimizers": groups,
        "schedulers": {
            n: {"kind": type(s).__name__, "state": plain(s.state_dict(), f"scheduler of '{n}'")}
            for n, s in program.schedulers.items()
        },
        "phases": [phase.name for phase in program.phases],
    }
    # safetensors refuses shared or strided storage; what is neither may not fit in memory twice.
    found = {n: t.detach().cpu().contiguous() for n, t in tensors.items() if wanted is None or wanted(n, t)}
    times = Counter(memory_of(t) for t in found.values())
    return {n: t.clone() if times[memory_of(t)] > 1 else t for n, t in found.items()}, header


def _own(program: Compiled) -> dict[str, Tensor]:
    found: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in (*program.root.named_parameters(), *program.root.named_buffers()):
        found.setdefault(id(tensor), (name, tensor))
    return dict(found.values())


def _digest(tensors: Mapping[str, Tensor], text: str) -> str:
    digest = hashlib.blake2b(text.encode(), digest_size=16)
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def exists(path: str | Path) -> bool:
    """Whether there is a checkpoint at a path."""
    return Path(path).is_file() or bool(folder.parts(Path(path)))


def _read_file(path: Path) -> tuple[Stored, dict[str, str], str]:
    tensors, metadata = read(path)
    return tensors, metadata, _digest(tensors.lying, metadata.get("locc", ""))


def _read_parts(path: Path) -> tuple[Stored, dict[str, str], str]:
    parts = [read(part)[0].lying for part in folder.parts(path)]
    sealed = next((part.pop("locc") for part in parts if "locc" in part), None)
    metadata = {} if sealed is None else json.loads(bytes(sealed.numpy()))
    digest = _digest({}, metadata.get("locc", "") + "".join(_digest(part, "") for part in parts))
    return Stored({name: t for part in parts for name, t in part.items()}), metadata, digest


def _read(path: Path) -> tuple[Stored, dict[str, Any]]:
    if not exists(path):
        raise CheckpointError(f"there is no checkpoint at '{path}'")
    try:
        tensors, metadata, digest = _read_parts(path) if path.is_dir() else _read_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"'{path}' is torn or no safetensors file: {error}") from error
    if "locc" not in metadata:
        raise CheckpointError(
            f"'{path}' is a safetensors file, but locc did not write it: its header has no 'locc'"
        )
    if digest != metadata.get("digest"):
        raise CheckpointError(f"'{path}' is damaged: the digest of what it holds differs from the one saved")
    header = json.loads(metadata["locc"])
    if header["format"] != FORMAT:
        raise CheckpointError(f"'{path}' has format {header['format']}; this locc reads format {FORMAT}")
    return tensors, header


def _apply(program: Compiled, tensors: Mapping[str, Tensor], header: dict[str, Any]) -> None:
    for path, held in states(program.root):  # has the rows of the batch that it last met
        held.value = torch.empty_like(tensors[f"state/{path}.value"], device=held.value.device)
    with torch.no_grad():
        for name, tensor in _own(program).items():
            tensor.copy_(tensors[f"state/{name}"])
    numbers = {owner: i for i, owner in enumerate(program.ir.owners)}
    offload = program.built.executor.offload
    for owner, learner in program.built.learners.items():
        saved = header["optimizers"][owner]
        state: dict[int, dict[str, Any]] = {}
        for index, held in saved["plain"].items():
            state[int(index)] = {k: restored(v) for k, v in held.items()}
        for name, tensor in _under(tensors, f"optimizer/{numbers[owner]}/").items():
            index, _, key = name.partition("/")
            state.setdefault(int(index), {})[key] = tensor
        learner.optimizer.load_state_dict({"state": state, "param_groups": restored(saved["groups"])})
        learner.clear()
        learner.pending = saved["pending"]
        for i, parameter in enumerate(learner.parameters):
            gradient = tensors.get(f"grad/{numbers[owner]}/{i}")
            parameter.grad = None if gradient is None else gradient.to(parameter.device)
        if offload is not None:
            offload.keep(owner)
    for name, scheduler in program.schedulers.items():
        scheduler.load_state_dict(restored(header["schedulers"][name]["state"]))
    program.steps, program.epochs, program.phase = header["steps"], header["epochs"], header["phase"]
    program.warm, program.progress = set(header["warm"]), None
    if header["progress"] is not None:
        parts = _under(tensors, "progress/")
        program.progress = Progress.unpacked(header["progress"], parts, program.device)
    program.built.executor.seed = header["seed"]
    program.built.workers.clear()
    for number, (phase, held) in header.get("replay", {}).items():
        if program.settings.replay is not None and program.ranks is None:
            kept = _under(tensors, f"replay/{number}/")
            program.workers(phase).restore(held, kept, program.device)
    if program.ranks is not None:
        forget(program.ranks, program.built.learners)
    torch.set_rng_state(tensors["random/cpu"])
    if "random/cuda" in tensors and program.device.type == "cuda":
        torch.cuda.set_rng_state(tensors["random/cuda"], program.device)


def _under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensors[name] for name in tensors if name.startswith(prefix)}
