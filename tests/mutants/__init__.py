"""Mutation of the verifier: leaks planted into training graphs, judged by a real run and by `locc.verify`;
and of the lowering: plans with something wrong in them, judged by a real run and by the assertions.

- `subjects`: the clean programs, and copies of their graphs that a mutant may spoil
- `edges`, `labels`, `scalars`, `tensors`: the mutations, each with all places in a graph where it applies
- `oracle`: what a graph really does to whose parameters, in plain PyTorch; knows nothing of `locc.verify`
- `lowering`: the mutations of plans, and their verdicts
- `judge`: one mutant's verdict; `run`: all of them (`make mutants`)
"""
