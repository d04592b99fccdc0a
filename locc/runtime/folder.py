"""A checkpoint in a folder, into which each rank writes its part by `torch.distributed.checkpoint`.

`folder/step-8-1a2b3c4d/` has a safetensors file for each rank, and the file `folder/current` the name of the
last such folder that is complete: until that is written, the one before holds.
"""

from __future__ import annotations

import os
import secrets
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from locc.errors import CheckpointError
from locc.publishing import replacing
from locc.runtime.ranks import Ranks

CURRENT = "current"
_STEP = "step-"


def is_meant(path: str | Path) -> bool:
    """Whether a path is that of such a folder: it ends in a slash, or a checkpoint is in it."""
    return str(path).endswith(("/", os.sep)) or (Path(path) / CURRENT).is_file()


def parts(path: Path) -> list[Path]:
    """Return the files of the checkpoint in a folder, in the order of the ranks that wrote them."""
    pointer = path / CURRENT
    if not pointer.is_file():
        return []
    return sorted((path / pointer.read_text(errors="replace")).glob("*.safetensors"))


def write(path: Path, tensors: Mapping[str, Tensor], steps: int, ranks: Ranks | None) -> None:
    """Write tensors, among ranks those of all; every rank calls it with its own.

    Raises:
        CheckpointError: on every rank, where one cannot write; what was there before is unharmed.
    """
    folder, problem = None, None
    if ranks is None or ranks.leads:
        folder = path / f"{_STEP}{steps}-{secrets.token_hex(4)}"
        problem = _made(folder)
    if ranks is not None:
        folder, problem = ranks.told((folder, problem))
    assert folder is not None
    problem = problem or _stored(folder, tensors, ranks)
    if ranks is None or ranks.leads:
        problem = problem or _pointed(folder)
        if problem is not None:
            shutil.rmtree(folder, ignore_errors=True)
    if ranks is not None:
        problem = ranks.told(problem)
    if problem is not None:
        raise CheckpointError(f"cannot save to '{path}': {problem}; what was there before is unharmed")


def _made(folder: Path) -> str | None:
    """Make the folder of a step; return what is wrong."""
    home = folder.parent
    if not home.parent.is_dir():
        return f"the folder '{home.parent}' does not exist"
    try:
        home.mkdir(exist_ok=True)
        folder.mkdir()
    except OSError as error:
        return str(error)
    return None


def _stored(folder: Path, tensors: Mapping[str, Tensor], ranks: Ranks | None) -> str | None:
    """Write each rank's tensors into a file of its own; return what is wrong on any of them."""
    # They take a second to load.
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    # Safetensors: what the library writes by default is a pickle in part, which runs code when it is read.
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    try:
        if ranks is not None:
            ranks.together(lambda group: save(dict(tensors), storage_writer=writer, process_group=group))
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that this process is alone
                save(dict(tensors), storage_writer=writer, no_dist=True)
    except CheckpointException as error:
        rank, (cause, _) = next(iter(error.failures.items()))
        return f"{type(cause).__name__}: {cause}" + (f" (rank {rank})" if ranks is not None else "")
    return None


def _pointed(folder: Path) -> str | None:
    """Make a complete folder the current one, and remove the others; return what is wrong."""
    home = folder.parent
    try:
        with replacing(home / CURRENT) as name:
            name.write_text(folder.name)
    except OSError as error:
        return str(error)
    for other in home.glob(f"{_STEP}*"):
        if other != folder:
            shutil.rmtree(other, ignore_errors=True)
    return None
