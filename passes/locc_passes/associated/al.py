"""`al`: associated learning."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from locc.ir import TrainingGraph
from locc.losses import Loss
from locc.nn import Factory
from locc.rewrite import (
    CLASS_IDS,
    NUMBERS,
    Method,
    OptimizerSpec,
    Pass,
    Recipe,
    is_rectified,
    option,
    prediction_spec,
    spec_of,
)
from locc_passes.associated.bridges import Bridges
from locc_passes.associated.dense import DenseLabels
from locc_passes.associated.fold import FoldedLabels, MergeMiddle
from locc_passes.associated.labels import LabelsAhead, ends_in

DECODERS = ("own", "dense")


@dataclass(frozen=True)
class AL(Method):
    """Associated learning: each module that encodes the input meets an encoding of the label.

    Component i has an encoder of the input f_i and a bridge b_i, and, with another owner, an encoder of the
    label g_i and its decoder h_i: s_i = f_i(sg s_{i-1}) and t_i = g_i(sg t_{i-1}), from the input and the
    one-hot label. mean (b_i(s_i) - sg t_i)^2 trains f_i and b_i, mean (h_i(t_i) - sg t_{i-1})^2 trains g_i
    and h_i. Inference is h_1(..h_K(b_K(f_K(..f_1(x))))), and its output are scores whose sigmoids were
    trained: the user's loss serves only to evaluate.

    `decoders="own"` folds the network: of Q modules the first K = Q // 2 are the f_i, and the last K, from
    the end, are the h_i. A middle module is the top bridge. Without one, or behind one that gives a map, an
    auxiliary bridge becomes part of the network. With `decoders="dense"`, the form of the released code, all
    Q modules are f_i, each with a dense h_i of `width` units, which inference keeps behind the top bridge;
    skips and several values may cross then. Prefer it for labels at each position (language models), where
    it learns in half the steps, and where an upper module ends in ReLUs, below which a class that begins
    there stays. Convolutions, residual blocks and attention that decode one label a sample do about as well
    or better: with dense decoders the top bridge reads the scores alone, and learns slowly from these.

    Not as published: codes of the classes begin equally far apart at each depth, and an encoder reads them
    less 1/2 (`build_label_encoder`), where He's rule brings them together. A folded residual network, at
    chance without this, learns.

    Where the input leaves a label open, as in language models, a bridge comes to the mean of the codes of
    what it may be. Decoders know codes of single labels: they rank what such a mean holds, but make no
    probabilities of it; even the exact means of counted pairs of characters decode to a cross-entropy far
    above that of the counts. Judge such a model by its accuracy.

    Labels encoded one by one have a code for each class, and class ids and these codes are what travels.
    Where all labels are of one row (pixels, by the user's own modules), or an `encoder` is given, the codes
    of the batch do.

    Label autoencoders need no data and begin on a plateau, so `fit` trains them ahead (`warmup`, a phase of
    the program); with 0 steps, as published, they take some hundred steps of the data. A loop of
    `program.step` begins without: set `program.phase = "labels"`, call `program.step(None,
    program.phases[0].made)` some hundred times, and set `program.phase = None`.

    Most of its step is in the bridges, whose hidden layer has `expansion` times the units of a code. A
    sequence with a class token is met in that token alone.
    """

    family: ClassVar[str] = "associated"
    reference: ClassVar[str] = "Kao & Chen 2021"
    recipe: ClassVar[Recipe] = Recipe(
        OptimizerSpec("adam", 1e-4),
        source="Kao & Chen 2021, released code: label encoders and decoders at twice the rate (label_lr)",
        network="ELUs, without BatchNorm but in residual networks",
    )
    target: ClassVar[tuple[str, ...]] = (CLASS_IDS, NUMBERS)

    decoders: str = option(
        "own",
        "own: the upper modules decode labels. dense: all modules encode, and dense decoders are "
        "added and kept at inference, as in the authors' code",
        choices=DECODERS,
    )
    width: int = option(
        256,
        "units of a label's code, with dense decoders (the paper's: 256 to 3000)",
        range=(16, 4096),
        scale="log",
    )
    label_lr: float = option(
        2.0,
        "learning rate of label encoders and decoders, in units of the others'",
        range=(0.2, 20.0),
        scale="log",
    )
    expansion: float = option(
        5.0, "width of a bridge's hidden layer, in units of its output", range=(0.5, 10.0), scale="log"
    )
    warmup: int = option(
        300,
        "steps that fit makes first: label encoders and decoders alone, on labels without data",
        range=(0, 2000),
    )
    bridge: Factory | None = option(None, "(activation's spec, label encoding's spec) -> bridge")
    encoder: Factory | None = option(None, "(label encoding's spec, next encoding's spec) -> label encoder")

    def __post_init__(self) -> None:
        if self.decoders not in DECODERS:
            raise ValueError(f"decoders={self.decoders!r}: choose {' or '.join(map(repr, DECODERS))}")
        if self.warmup < 0:
            raise ValueError(f"warmup={self.warmup}: give a number of steps of at least 0")
        for name in ("label_lr", "expansion", "width"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)}: give a number above 0")

    def advise(self, ir: TrainingGraph, rates: Mapping[str, float]) -> Iterator[str]:
        """Warn of modules that decode labels badly, and of a loss that reads scores as numbers."""
        loss = Loss.of(ir.loss_function).name
        if loss in ("mse", "l1") and not ends_in(ir, ir.prediction, (nn.Sigmoid,), ("sigmoid", "sigmoid_")):
            yield (
                f"loss '{loss}' reads the output as numbers, and what is trained to meet the target is its "
                "sigmoid; end the model in nn.Sigmoid and give targets within 0 and 1, or use 'dtp' or 'dgl'"
            )
        codes = {
            node.meta["feeds"]: str(node.meta["owner"]) for node in ir.graph.nodes if "feeds" in node.meta
        }
        for value, owner in codes.items():
            if len(prediction_spec(ir).shape) > 2:
                what = f"decodes codes of labels at each position, {spec_of(value)}"
            elif is_rectified(value, ir.root) and value.meta["owner"] in codes.values():
                what, owner = "has to decode a code of the label by a ReLU", str(value.meta["owner"])
            else:
                continue
            yield f"module '{owner}' {what}; dense decoders learn that faster: decoders='dense'"

    def passes(self) -> Sequence[Pass]:
        """Return the fold, the label side, the input side and the warm-up."""
        ends: tuple[Pass, ...] = (
            Bridges(self.expansion, self.bridge),
            LabelsAhead(self.warmup),
        )
        if self.decoders == "dense":
            return (DenseLabels(self.label_lr, self.encoder, self.width), *ends)
        return (MergeMiddle(), FoldedLabels(self.label_lr, self.encoder), *ends)


@dataclass(frozen=True)
class ALPipe(AL):
    """Associated learning in a pipeline: `al` whose components train at the same time.

    Component i trains on batch t while component i - 1 trains on batch t + 1, each in a process of its own
    (see the schedule "pipelined"), so that K components take n + K - 1 steps for n batches. It ends with the
    bits of `al`; in one process it is `al`. Kao & Chen, "Associated Learning" (2021), section 3, describe the
    pipeline; their released code trains one component after the other.
    """

    schedule: ClassVar[str] = "pipelined"
