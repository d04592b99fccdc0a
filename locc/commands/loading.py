"""Models and data named on the command line."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import os
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from locc import registry
from locc.budget import MemoryBudget, fit
from locc.commands.flags import MisuseError
from locc.compiler import compile
from locc.errors import nearest
from locc.losses import MODEL
from locc.recipes import OPTIMIZERS, OptimizerSpec, Recipe
from locc.request import Splits
from locc.runtime.evaluation import batch_of

DTYPES = {
    "float32": torch.float32, "float64": torch.float64, "float16": torch.float16, "bfloat16": torch.bfloat16,
    "int64": torch.int64, "int32": torch.int32, "bool": torch.bool,
}  # fmt: skip


def named_object(text: str, what: str) -> Any:
    """Return what `package.module:name` or `path/to/file.py:name` names.

    Raises:
        MisuseError: the text has another form, or nothing of that name is there.
    """
    place, colon, name = text.rpartition(":")
    if not colon or not place or not name:
        raise MisuseError(f"{what} '{text}': write package.module:name or path/to/file.py:name")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    module = _file(place, what) if place.endswith(".py") else _module(place, what)
    found: Any = module
    for part in name.split("."):
        if not hasattr(found, part):
            known = ", ".join(n for n in vars(module) if not n.startswith("_"))[:200]
            raise MisuseError(f"{what} '{text}': '{place}' holds no '{name}'; it holds {known}")
        found = getattr(found, part)
    return found


def _module(place: str, what: str) -> Any:
    try:
        return importlib.import_module(place)
    except ModuleNotFoundError as error:
        if error.name and (place == error.name or place.startswith(f"{error.name}.")):
            raise MisuseError(
                f"{what}: there is no module '{error.name}', looked for in the working directory and among "
                "the installed packages; a file is written as path/to/file.py:name"
            ) from error
        raise


def _file(place: str, what: str) -> Any:
    path = Path(place)
    if not path.is_file():
        raise MisuseError(f"{what}: there is no file '{place}'")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise MisuseError(f"{what}: '{place}' is no Python file")
    module = importlib.util.module_from_spec(spec)
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.append(folder)  # the file's own neighbours
    before = sys.modules.get(path.stem)
    sys.modules[path.stem] = module  # dataclasses and pickles look their module up
    try:
        spec.loader.exec_module(module)
    except BaseException:
        if before is None:
            del sys.modules[path.stem]
        else:
            sys.modules[path.stem] = before
        raise
    return module


def load_model(text: str) -> tuple[nn.Module, Any]:
    """Return the model that a factory, a class or an instance gives, and its example inputs.

    The factory may return (model, example inputs); a model may hold them as `example_inputs`, or as
    `example_input_array` as in Lightning. Otherwise they are None.

    Raises:
        MisuseError: it gives something else.
    """
    found = named_object(text, "model")
    if not isinstance(found, nn.Module) and callable(found):
        found = found()
    example = None
    if isinstance(found, tuple) and len(found) == 2 and isinstance(found[0], nn.Module):
        found, example = found
    if not isinstance(found, nn.Module):
        raise MisuseError(
            f"model '{text}' gives a {type(found).__name__}; it must give a torch.nn.Module, or one and "
            "its example inputs"
        )
    for name in ("example_inputs", "example_input_array"):
        if example is None:
            example = getattr(found, name, None)
    return found, example


@dataclass(frozen=True)
class Data:
    """Loaders for training and, if there is one, for validation.

    `labels_within` says that the model reads the labels among its inputs: it computes its own loss.
    """

    training: Iterable[Any]
    validation: Iterable[Any] | None = None
    labels_within: bool = False

    def example(self) -> Any:
        """Return the inputs of the first batch."""
        return self.first()[0]

    def first(self) -> tuple[Any, Any]:
        """Return inputs and target of the first batch."""
        for batch in self.training:
            return batch_of(batch, self.labels_within)
        raise MisuseError("the data hold no batch")


def load_data(text: str, batch_size: int, seed: int, shape: Sequence[int] | None) -> Data:
    """Return the data that `digits` or a factory gives.

    Raises:
        MisuseError: it gives something that yields no batches.
    """
    if text == "digits":
        return _digits(batch_size, seed, tuple(shape) if shape else (1, 8, 8))
    found = named_object(text, "data")
    if callable(found) and not hasattr(found, "__iter__"):
        found = found()
    if isinstance(found, tuple) and len(found) == 2:
        return Data(_loader(text, found[0]), _loader(text, found[1]))
    return Data(_loader(text, found))


def _loader(text: str, found: Any) -> Iterable[Any]:
    if not isinstance(found, Iterable) or isinstance(found, (Tensor, str, dict)):
        raise MisuseError(
            f"data '{text}' gives a {type(found).__name__}; it must give a DataLoader, or two: "
            "(training, validation)"
        )
    if iter(found) is found:
        raise MisuseError(
            f"data '{text}' gives a generator, which can be read only once; give a DataLoader or a list"
        )
    return found


def _digits(batch_size: int, seed: int, shape: tuple[int, ...]) -> Data:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise MisuseError("--data digits needs scikit-learn: pip install 'locc[demo]'") from error
    raw = load_digits()
    images = torch.tensor(raw.images, dtype=torch.float32) / 16.0
    if images[0].numel() != torch.Size(shape).numel():
        raise MisuseError(
            f"--input-shape {','.join(map(str, shape))}: an image of the digits has 64 pixels: 1,8,8 or 64"
        )
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(2024))
    x, y = images[order].reshape(-1, *shape), torch.tensor(raw.target, dtype=torch.long)[order]
    held_out = 360
    generator = torch.Generator().manual_seed(seed)
    return Data(
        DataLoader(
            TensorDataset(x[held_out:], y[held_out:]),
            batch_size,
            shuffle=True,
            drop_last=True,
            generator=generator,
        ),
        DataLoader(TensorDataset(x[:held_out], y[:held_out]), 256),
    )


def shape_of(text: str) -> tuple[int, ...]:
    """Read `1,8,8`.

    Raises:
        MisuseError: it is no list of sizes.
    """
    try:
        shape = tuple(int(part) for part in text.replace("x", ",").split(",") if part.strip())
    except ValueError:
        shape = (0,)
    if any(size < 1 for size in shape):
        raise MisuseError(f"--input-shape {text}: write the sizes of one sample, such as 1,8,8")
    return shape


def example_of(shapes: Sequence[str], dtype: str, batch: int) -> Any:
    """Return example inputs of the given shapes, one for each."""
    if dtype not in DTYPES:
        raise MisuseError(f"--input-dtype {dtype}: choose one of {', '.join(DTYPES)}")
    kind = DTYPES[dtype]
    tensors = []
    for text in shapes:
        shape = (batch, *shape_of(text))
        floating = kind.is_floating_point
        tensors.append(torch.randn(shape).to(kind) if floating else torch.randint(0, 2, shape).to(kind))
    return tensors[0] if len(tensors) == 1 else tuple(tensors)


def splits_of(text: str, batch: int = 1) -> Splits | MemoryBudget:
    """Read the value of --splits; a budget is for steps of so many samples."""
    if text.strip().isdigit():
        return int(text)
    if re.fullmatch(r"\s*[\d.]+\s*[KMGT]?i?B\s*", text):
        return fit(memory=text, batch=batch)
    return [name.strip() for name in text.split(",") if name.strip()]


def settings_of(texts: Iterable[str], elsewhere: Iterable[str]) -> dict[str, Any]:
    """Read the values of --set: further arguments of `locc.compile`, each as NAME=VALUE.

    Args:
        texts: what was given; a value is a Python literal, or else text.
        elsewhere: the arguments that have flags of their own.

    Raises:
        MisuseError: there is no such argument, or it has a flag, or none is meant.
    """
    named = {p.name for p in signature(compile).parameters.values() if p.kind is not p.VAR_KEYWORD}
    own = named & set(elsewhere)
    known, found = sorted(named - own - {"model", "example_inputs"}), {}
    for text in texts:
        name, equals, value = (part.strip() for part in text.partition("="))
        if name in own:
            raise MisuseError(f"--set {text}: give --{name.replace('_', '-')}")
        if not equals or name not in known:
            raise MisuseError(f"--set {text}: give NAME=VALUE; {nearest(name, known)}")
        try:
            found[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            found[name] = value
    return found


def loss_of(text: str) -> Any:
    """Read the value of --loss."""
    return named_object(text, "loss") if ":" in text else text


def recipe_of(method: str, optimizer: str | None, lr: float | None) -> Recipe:
    """Return the recipe that --optimizer and --lr describe; without the former, the method's own at the rate.

    Raises:
        MisuseError: there is no such optimizer.
    """
    if optimizer is None:
        own = registry.load(method).recipe
        return own if lr is None else own.at(lr)
    known = (*OPTIMIZERS, "momentum")
    if optimizer not in known:
        raise MisuseError(f"--optimizer {optimizer}: {nearest(optimizer, known)}")
    name, arguments = ("sgd", {"momentum": 0.9}) if optimizer == "momentum" else (optimizer, {})
    return Recipe(OptimizerSpec(name, 1e-3 if lr is None else lr, arguments), source="--optimizer")


def inputs_of(data: Data | None, shapes: list[str] | None, dtype: str, batch: int, own: Any = None) -> Any:
    """Return example inputs from the data, of the given shapes, or the model's own.

    Raises:
        MisuseError: there are none of these.
    """
    if data is not None:
        return data.example()
    if shapes:
        return example_of(shapes, dtype, batch)
    if own is not None:
        return own
    raise MisuseError(
        "the model's inputs are unknown: give --input-shape, such as --input-shape 1,8,8, or --data, or let "
        "the factory return (model, example inputs)"
    )


def data_of(text: str | None, batch_size: int, seed: int, shapes: list[str] | None, loss: str) -> Data | None:
    """Read the value of --data, for the value of --loss."""
    if not text:
        return None
    data = load_data(text, batch_size, seed, shape_of(shapes[0]) if shapes else None)
    return replace(data, labels_within=loss == MODEL)


def placed(model: nn.Module, device: str) -> nn.Module:
    """Return the model on the device of --device.

    Raises:
        MisuseError: there is no such device.
    """
    try:
        return model.to(torch.device(device))
    except (RuntimeError, AssertionError) as error:
        raise MisuseError(f"--device {device}: {str(error).splitlines()[0]}") from error
