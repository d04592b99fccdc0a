"""Recurrent language models, loops over time, tied and shared weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from zoo.case import Case, case, classes, normal, token_loss, tokens

VOCABULARY = 11


class RecurrentLM(nn.Module):
    def __init__(self, kind: type[nn.RNNBase], layers: int = 2) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 8)
        self.rnns = nn.ModuleList([kind(8, 8, batch_first=True) for _ in range(layers)])
        self.drop = nn.Dropout(0.2)
        self.head = nn.Linear(8, VOCABULARY)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for rnn in self.rnns:
            out, _ = rnn(x)
            x = self.drop(out)
        return self.head(x)


class LastState(nn.Module):
    """Uses the state of an LSTM with time first, so its batch is not the first dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.rnn, self.head = nn.Embedding(VOCABULARY, 8), nn.LSTM(8, 6), nn.Linear(6, 4)

    def forward(self, ids: Tensor) -> Tensor:
        _, (hidden, _) = self.rnn(self.embed(ids).transpose(0, 1))
        return self.head(hidden[-1])


class CellLoop(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(3, 8)
        self.cell1, self.cell2 = nn.GRUCell(8, 6), nn.GRUCell(6, 6)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        first = x.new_zeros(x.size(0), 6)
        second = torch.zeros(x.size(0), 6, device=x.device, dtype=x.dtype)
        for t in range(x.size(1)):
            first = self.cell1(self.embed(x[:, t]), first)
            second = self.cell2(first, second)
        return self.head(second)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 8)
        self.body = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
        self.head = nn.Linear(8, VOCABULARY, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.body(self.embed(ids)))


class FunctionallyTied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 8)
        self.body = nn.Linear(8, 8)

    def forward(self, ids: Tensor) -> Tensor:
        return nn.functional.linear(torch.tanh(self.body(self.embed(ids))), self.embed.weight)


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 8)
        block = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
        self.blocks = nn.ModuleList([block, block, block])
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


CASES: list[Case] = [
    case("lstm_lm", lambda: RecurrentLM(nn.LSTM), tokens(5, VOCABULARY), classes(VOCABULARY, 5),
         [["embed"], ["rnns.0"], ["embed", "rnns.0", "rnns.1"]], token_loss, "recurrent dropout tokens"),
    case("gru_lm", lambda: RecurrentLM(nn.GRU), tokens(5, VOCABULARY), classes(VOCABULARY, 5),
         [["rnns.0"], ["embed", "rnns.0", "rnns.1"]], token_loss, "recurrent dropout tokens"),
    case("lstm_state", LastState, tokens(5, VOCABULARY), classes(4), [["embed"], ["rnn"]], tags="recurrent"),
    case("gru_cells", CellLoop, normal(3, 3), classes(4), [["cell2"], ["cell1"], ["cell1", "cell2"]],
         tags="recurrent loop", origins=("concrete",)),
    case("tied_head", Tied, tokens(5, VOCABULARY), classes(VOCABULARY, 5), [["body"], ["body.0"]], token_loss,
         "tied tokens"),
    case("tied_functional", FunctionallyTied, tokens(5, VOCABULARY), classes(VOCABULARY, 5),
         [["embed"], ["body"]], token_loss, "tied tokens"),
    case("shared_block", Shared, normal(6), classes(4), [["stem"], ["stem", "blocks.0"]], tags="shared"),
]  # fmt: skip
