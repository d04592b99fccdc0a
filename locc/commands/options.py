"""Arguments and options that several commands take."""

from __future__ import annotations

from typing import Annotated

import typer

from locc.registry import registered

ModelArgument = Annotated[
    str, typer.Argument(metavar="MODEL", help="package.module:factory or path/to/file.py:factory")
]


def _complete_method(begun: str) -> list[str]:
    return [name for name in sorted(registered()) if name.startswith(begun)]


MethodOption = Annotated[
    str,
    typer.Option(
        "--method", "-m", help="id of the method; `locc methods` lists them", autocompletion=_complete_method
    ),
]
SplitsOption = Annotated[
    str,
    typer.Option(
        "--splits", "-s",
        help="cut after these submodules: names or globs with commas between them; or the number of modules "
        "of balanced cost (a submodule called 3 is written '3,'); or 2GiB, say, for the fewest modules whose "
        "steps of --batch-size keep to that memory",
    ),
]  # fmt: skip
LossOption = Annotated[
    str,
    typer.Option(
        help="cross_entropy, mse, bce, l1, model (its own), or package.module:function of (output, target)"
    ),
]
PredictionOption = Annotated[
    str | None,
    typer.Option(help="of several tensors that the model returns, the name of the one to learn by"),
]
TiedOption = Annotated[
    str, typer.Option(help="policy for a parameter that two modules use: auto, owner, copy or error")
]
DynamicOption = Annotated[
    bool,
    typer.Option(
        "--dynamic",
        help="let lengths, sizes of images and the like vary beside the batch, where the model does",
    ),
]
DataOption = Annotated[
    str | None,
    typer.Option(
        help="digits (scikit-learn's), or package.module:factory of a loader or of (training, validation)"
    ),
]
ShapeOption = Annotated[
    list[str] | None,
    typer.Option(
        "--input-shape", help="sizes of one sample, such as 1,8,8; once for each input of the model"
    ),
]
DtypeOption = Annotated[
    str, typer.Option("--input-dtype", help="dtype of the inputs that --input-shape describes")
]
SeedOption = Annotated[
    int, typer.Option(help="of the initial weights, the auxiliaries, the noise and the shuffling")
]
CacheOption = Annotated[
    bool,
    typer.Option("--cache", help="keep what capturing this model has shown, and use it the next time"),
]
DebugOption = Annotated[bool, typer.Option("--debug", help="show the traceback of an error")]
BatchOption = Annotated[
    int, typer.Option("--batch-size", min=1, help="samples in a batch of digits or example inputs")
]
