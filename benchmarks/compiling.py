"""`python -m benchmarks.compiling`: what `locc.compile` costs, in passes through the model.

A pass is one forward and backward of the plain model on the whole example batch. In each round one pass
(the median of three) and one compile of a fresh copy are timed, in processor time, so that a busy machine
changes little, and the ratio is taken within the round. `runs` counts how often real tensors go through
the model's first layer while it compiles, `batches` the samples of these runs in batches. The last lines
compare the peak memory of a compile with that of a step.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import locc
from benchmarks.meter import gradients_of, peak
from benchmarks.models import BLOCKS, WORKLOADS

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))  # the zoo of the tests
from zoo.vision import BasicBlock, Bottleneck, ResNet

VOCABULARY, LENGTH = 512, 128
STAGES = ("layer1", "layer2", "layer3")


@dataclass(frozen=True)
class Subject:
    """A model, one call of it, its target, its loss and where to cut it."""

    model: Callable[[], nn.Module]
    batch: Callable[[], tuple[Any, Any]]
    loss: Any
    splits: Sequence[str]


def resnet(block: type[BasicBlock] | type[Bottleneck], depths: tuple[int, ...], batch: int) -> Subject:
    """A ResNet of ImageNet's widths on images of 128 x 128."""
    return Subject(
        lambda: ResNet(block, depths, 64),
        lambda: (torch.randn(batch, 3, 128, 128), torch.randint(0, 5, (batch,))),
        "cross_entropy",
        STAGES,
    )


def chain(name: str) -> Subject:
    """One of the chains of `benchmarks.models`, cut into four."""
    workload = WORKLOADS[name]
    cuts = [f"blocks.{BLOCKS * k // 4 - 1}" for k in (1, 2, 3)]
    return Subject(workload.model, workload.batch, workload.loss, cuts)


def hugging_face(config: str, model: str, splits: Sequence[str], **sizes: Any) -> Subject:
    """A model of transformers with random weights, on tokens or on images."""

    def build() -> nn.Module:
        import transformers

        return getattr(transformers, model)(getattr(transformers, config)(**sizes))

    def batch() -> tuple[Any, Any]:
        if "image_size" in sizes:
            return torch.randn(4, 3, 128, 128), torch.randint(0, 2, (4,))
        tokens = torch.randint(2, VOCABULARY, (4, LENGTH))
        return tokens, tokens if "LM" in model else torch.randint(0, 2, (4,))

    def loss(output: Any, target: Tensor) -> Tensor:
        return nn.functional.cross_entropy(output.logits.flatten(0, -2), target.flatten())

    return Subject(build, batch, loss, splits)


LAYERS = {"hidden_size": 128, "num_hidden_layers": 12, "num_attention_heads": 4, "intermediate_size": 512}
TEXT = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None}

SUBJECTS = {
    "resnet18": resnet(BasicBlock, (2, 2, 2, 2), 32),
    "resnet50": resnet(Bottleneck, (3, 4, 6, 3), 4),
    "bert": hugging_face(
        "BertConfig",
        "BertForSequenceClassification",
        [f"bert.encoder.layer.{i}" for i in (2, 5, 8)],
        **LAYERS,
        vocab_size=VOCABULARY,
    ),
    "gpt2": hugging_face(
        "GPT2Config",
        "GPT2LMHeadModel",
        [f"transformer.h.{i}" for i in (2, 5, 8)],
        n_layer=12,
        n_embd=128,
        n_head=4,
        **TEXT,
    ),
    "llama": hugging_face(
        "LlamaConfig", "LlamaForCausalLM", [f"model.layers.{i}" for i in (2, 5, 8)], **LAYERS, **TEXT
    ),
    "vit": hugging_face(
        "ViTConfig",
        "ViTForImageClassification",
        [f"vit.layers.{i}" for i in (2, 5, 8)],
        **LAYERS,
        image_size=128,
        patch_size=8,
    ),
    "mlp": chain("mlp"),
    "resnet (chain)": chain("resnet"),
    "gpt (chain)": chain("gpt"),
}


def measure(subject: Subject, method: str, rounds: int) -> tuple[list[float], list[float], int, float]:
    """Return the seconds of a pass and of a compile in each round, and the runs, as calls and as batches."""
    passes, compiles = [], []
    for _ in range(rounds):
        torch.manual_seed(0)
        model, (x, y) = subject.model(), subject.batch()
        passes.append(
            statistics.median(timed(one_pass, copy.deepcopy(model), subject, x, y) for _ in range(3))
        )
        compiles.append(timed(compiled, subject, copy.deepcopy(model), method, x))
    sizes: list[int] = []
    first = next(m for m in model.modules() if not [*m.children()] and [*m.parameters()])
    first.register_forward_pre_hook(lambda _, given: note(sizes, given[0]))
    compiled(subject, model, method, x)
    return passes, compiles, len(sizes), sum(sizes) / len(x)


def note(sizes: list[int], given: Tensor) -> None:
    """Note a run on real tensors."""
    if type(given) is Tensor and not given.is_meta:
        sizes.append(len(given))


def one_pass(model: nn.Module, subject: Subject, x: Any, y: Any) -> None:
    """Run the plain model forward and backward."""
    loss = nn.functional.cross_entropy if subject.loss == "cross_entropy" else subject.loss
    loss(model(x), y).backward()


def compiled(subject: Subject, model: nn.Module, method: str, x: Any) -> locc.Program:
    """Compile a subject."""
    return locc.compile(model, method, subject.splits, loss=subject.loss, example_inputs=x, tied="owner")


def timed(run: Callable[..., Any], *given: Any) -> float:
    """Return the seconds of processor time that a call takes: others may use the machine."""
    start = time.process_time()
    run(*given)
    return time.process_time() - start


def row(name: str, method: str, rounds: int) -> str:
    """Return a row of the table."""
    passes, compiles, runs, batches = measure(SUBJECTS[name], method, rounds)
    ratios = sorted(c / p for c, p in zip(compiles, passes, strict=True))
    spread = f"{statistics.median(ratios):.1f} ({ratios[0]:.1f} to {ratios[-1]:.1f})"
    seconds = f"{statistics.median(passes):.2f} s | {statistics.median(compiles):.2f} s"
    return f"| {name} | {method} | {seconds} | {spread} | {runs} | {batches:.1f} |"


def memory(batch: int, side: int) -> str:
    """Return the peak memory of a compile of ResNet-18 and of a step of it, for a batch of square images."""
    subject = SUBJECTS["resnet18"]
    model, x, y = subject.model(), torch.randn(batch, 3, side, side), torch.randint(0, 5, (batch,))
    program = compiled(subject, copy.deepcopy(model), "dgl", x)
    program.step(x, y)
    step = peak(lambda: program.step(x, y), gradients_of(program)).total
    compile_ = peak(lambda: compiled(subject, model, "dgl", x), gradients_of(model)).total
    shape = f"[{batch},3,{side},{side}]"
    return f"resnet18, dgl, {shape}: compile {compile_ / 1e6:.0f} MB, step {step / 1e6:.0f} MB"


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--models", nargs="*", default=list(SUBJECTS), choices=list(SUBJECTS))
    parser.add_argument("--methods", nargs="*", default=["bp", "dgl"])
    given = parser.parse_args(arguments)
    warnings.simplefilter("ignore", locc.LoccWarning)
    compiled(chain("mlp-small"), WORKLOADS["mlp-small"].model(), "bp", WORKLOADS["mlp-small"].batch()[0])
    print("| model | method | pass | compile | compile / pass | runs | batches |")
    print("|---|---|---|---|---|---|---|")
    for name in given.models:
        for method in given.methods:
            print(row(name, method, given.rounds), flush=True)
    if "resnet18" in given.models:
        print()
        for side in (32, 64, 128):
            print(memory(64, side), flush=True)


if __name__ == "__main__":
    main()
