"""What capture learnt about a model, on disk: which trace was admitted, and its shapes at other sizes.

A file holds no graph and no code: it is JSON. The graph is traced from the live model every time, and the
file says that a graph of this digest, under the same code, versions and shapes, has passed the admission
test. Its outputs are still compared with the model's at one size; the gradients and the other sizes are
what the file spares.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import logging
import os
import platform
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from locc import version
from locc.capture.admission import Look
from locc.capture.batch import Call
from locc.capture.graphs import Trace
from locc.capture.targets import InRegion, Region, printable
from locc.ir.captured import Root
from locc.ir.spec import Point
from locc.publishing import replacing

_FORMAT = 1
_log = logging.getLogger("locc")


def folder() -> Path:
    """Return where captures are kept: `LOCC_CACHE`, or `locc` in the user's folder of caches."""
    chosen = os.environ.get("LOCC_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", "~/AppData/Local")).expanduser() / "locc" / "Cache"
    if sys.platform == "darwin":
        return Path("~/Library/Caches/locc").expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "locc"


@dataclass(frozen=True)
class Mode:
    """What is known of the graph of one mode.

    Attributes:
        points: where it was traced.
        digest: of the graph, its guards and what it notes.
        looks: what each node returned where it was admitted, in the order of the nodes.
    """

    points: list[Point]
    digest: str
    looks: dict[Point, list[Any]]


@dataclass(frozen=True)
class Record:
    """What is known of a captured model; `shared` says that inference has the graph of training."""

    origin: str
    training: Mode
    inference: Mode
    shared: bool
    lifted: bool


def key_of(root: Root, call: Call, opened: Iterable[str]) -> str | None:
    """Return the digest of everything that a capture depends on, or None where some code has no source."""
    try:
        classes = {kind for module in root.model.modules() for kind in type(module).__mro__}
        sources = sorted({f"{k.__module__}.{k.__qualname__} {_source(k)}" for k in classes if not _torch(k)})
    except (OSError, TypeError) as error:
        _log.warning("locc: the capture is not kept: the source of the model's code is not known (%s)", error)
        return None
    tensors = [
        (name, list(t.shape), str(t.dtype), str(t.device), t.requires_grad)
        for name, t in (*root.named_parameters(), *root.named_buffers())
    ]
    dims = [{i: [d.name, d.size, d.other] for i, d in free.items()} for free in call.free]
    values = [
        [list(v.shape), list(v.stride()), str(v.dtype), str(v.device)]
        if isinstance(v, torch.Tensor)
        else repr(v)
        if printable(v)
        else type(v).__qualname__
        for v in call.leaves
    ]
    paths = [str(path) for path in call.structure.paths()]
    modules = [(path, type(m).__qualname__, _settings(m)) for path, m in root.named_modules()]
    setting = [_versions(), str(torch.get_default_dtype()), repr(Region.now()), repr(call.constants)]
    return _digest([setting, sources, modules, tensors, dims, values, paths, sorted(opened)])


def record_of(origin: str, training: Trace, inference: Trace, shared: bool, lifted: bool) -> Record | None:
    """Return the record of two admitted traces, or None where a digest could not tell them from others."""
    if training.whole or (inference.whole and not shared):
        return None
    modes = [Mode(trace.points, digest_of(trace), trace.looks) for trace in (training, inference)]
    return Record(origin, modes[0], modes[1], shared, lifted)


def digest_of(trace: Trace) -> str:
    """Return the digest of a trace: nodes, arguments, guards and notes."""
    nodes = [
        [n.op, n.name, _target(n.target), repr(n.args), repr(n.kwargs), repr(n.meta.get("stack", ()))]
        for n in trace.graph.nodes
    ]
    return _digest([nodes, [guard.text for guard in trace.guards], trace.notes])


def read(key: str) -> Record | None:
    """Return what is kept under a key; None, with a note where a file is broken."""
    path = folder() / f"{key}.json"
    try:
        kept = json.loads(path.read_bytes())
        if kept["format"] != _FORMAT or kept["key"] != key or kept["check"] != _digest(kept["record"]):
            raise ValueError("its contents do not match its checksum")
        record = kept["record"]
        modes = [_mode(record[name]) for name in ("training", "inference")]
        return Record(record["origin"], modes[0], modes[1], bool(record["shared"]), bool(record["lifted"]))
    except FileNotFoundError:
        return None
    except Exception as error:  # whatever is in the file
        _log.warning("locc: the kept capture '%s' is not used and made anew: %s", path, error)
        return None


def write(key: str, record: Record) -> None:
    """Keep a record; one that cannot be written is noted and costs nothing else."""
    place = folder()
    try:
        kept = {
            "origin": record.origin,
            "training": _plain(record.training),
            "inference": _plain(record.inference),
            "shared": record.shared,
            "lifted": record.lifted,
        }
        text = json.dumps({"format": _FORMAT, "key": key, "check": _digest(kept), "record": kept})
        place.mkdir(parents=True, exist_ok=True)
        with replacing(place / f"{key}.json") as part:
            part.write_text(text, encoding="utf-8")
    except (OSError, TypeError) as error:
        _log.warning("locc: the capture cannot be kept in '%s': %s", place, error)


def _settings(module: nn.Module) -> list[str]:
    """Return a module's plain attributes: its shapes hang on them, also at sizes that are not compared."""
    plain = {k: v if isinstance(v, tuple) else (v,) for k, v in vars(module).items() if k != "training"}
    return [f"{k}={v!r}" for k, v in sorted(plain.items()) if all(map(printable, v))]


def _torch(kind: type) -> bool:
    return kind is object or kind.__module__.partition(".")[0] in ("torch", "builtins", "abc", "typing")


def _source(kind: type) -> str:
    """Return the digest of the file that a class is written in, or of the class where it has no file."""
    file = getattr(sys.modules.get(kind.__module__), "__file__", None)
    if file is not None and file.endswith(".py"):
        return hashlib.blake2b(Path(file).read_bytes(), digest_size=16).hexdigest()
    return _digest(inspect.getsource(kind))


@functools.cache
def _versions() -> list[str]:
    own = Path(version.__file__).parent
    code = hashlib.blake2b(digest_size=16)
    for path in sorted(own.rglob("*.py")):
        code.update(path.read_bytes())
    return [code.hexdigest(), torch.__version__, sys.version, platform.machine()]


def _target(target: Any) -> str:
    if isinstance(target, str):
        return target
    if isinstance(target, InRegion):
        return f"{target.region} {_target(target.function)}"
    name = getattr(target, "__qualname__", None)
    return f"{getattr(target, '__module__', '')}.{name}" if name else repr(target)


def _digest(value: Any) -> str:
    return hashlib.blake2b(json.dumps(value, default=str).encode(), digest_size=16).hexdigest()


def _plain(mode: Mode) -> dict[str, Any]:
    looks = [[[p.batch, p.probe], [_encoded(look) for look in found]] for p, found in mode.looks.items()]
    return {"points": [[p.batch, p.probe] for p in mode.points], "digest": mode.digest, "looks": looks}


def _mode(kept: dict[str, Any]) -> Mode:
    looks = {Point(*point): [_decoded(look) for look in found] for point, found in kept["looks"]}
    return Mode([Point(*point) for point in kept["points"]], kept["digest"], looks)


def _encoded(look: Any) -> Any:
    if isinstance(look, Look):
        return ["tensor", list(look.shape), str(look.dtype), look.grad]
    if isinstance(look, tuple):
        return ["tuple", [_encoded(part) for part in look]]
    if isinstance(look, dict):
        if not all(type(key) in (str, int) for key in look):
            raise TypeError(f"JSON has no keys such as {list(look)}")
        return ["dict", [[key, _encoded(part)] for key, part in look.items()]]
    return None


def _decoded(kept: Any) -> Any:
    if kept is None:
        return None
    kind, content, *rest = kept
    if kind == "tensor":
        return Look(tuple(content), getattr(torch, rest[0].removeprefix("torch.")), rest[1])
    if kind == "tuple":
        return tuple(_decoded(part) for part in content)
    return {key: _decoded(part) for key, part in content}
