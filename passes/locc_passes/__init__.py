"""The method library: one folder a family, one method a file."""

PASSES = {
    "bp": "locc_passes.baseline.bp:BP",
    "dgl": "locc_passes.proxy.dgl:DGL",
    "predsim": "locc_passes.proxy.predsim:PredSim",
    "sim": "locc_passes.proxy.predsim:Sim",
    "pred": "locc_passes.proxy.predsim:Pred",
    "infopro": "locc_passes.proxy.infopro:InfoPro",
    "greedy-seq": "locc_passes.proxy.stagewise:GreedySeq",
    "cascade": "locc_passes.proxy.stagewise:Cascade",
    "fixed-aux": "locc_passes.proxy.fixed_aux:FixedAux",
    "pair-proxy": "locc_passes.proxy.pairs:PairProxy",
    "kernel-pull": "locc_passes.proxy.pairs:KernelPull",
    "gim": "locc_passes.proxy.gim:GIM",
    "dni": "locc_passes.synthetic.dni:DNI",
    "cdni": "locc_passes.synthetic.dni:CDNI",
    "dtp": "locc_passes.target.dtp:DTP",
    "tp": "locc_passes.target.dtp:TP",
    "fa": "locc_passes.feedback.fa:FA",
    "dfa": "locc_passes.feedback.dfa:DFA",
    "altmin": "locc_passes.auxiliary_variables.altmin:AltMin",
    "al": "locc_passes.associated.al:AL",
}
