"""The method library: one folder a family, one method a file."""

PASSES = {
    "bp": "locc_passes.baseline.bp:BP",
    "dgl": "locc_passes.proxy.dgl:DGL",
    "predsim": "locc_passes.proxy.predsim:PredSim",
    "sim": "locc_passes.proxy.predsim:Sim",
    "pred": "locc_passes.proxy.predsim:Pred",
    "dni": "locc_passes.synthetic.dni:DNI",
    "cdni": "locc_passes.synthetic.dni:CDNI",
    "dtp": "locc_passes.target.dtp:DTP",
    "tp": "locc_passes.target.dtp:TP",
    "fa": "locc_passes.feedback.fa:FA",
    "dfa": "locc_passes.feedback.dfa:DFA",
    "altmin": "locc_passes.auxiliary_variables.altmin:AltMin",
    "bcd2": "locc_passes.auxiliary_variables.bcd:BCD2",
    "bcd3": "locc_passes.auxiliary_variables.bcd:BCD3",
    "admm": "locc_passes.auxiliary_variables.admm:ADMM",
    "dladmm": "locc_passes.auxiliary_variables.dladmm:DLADMM",
    "al": "locc_passes.associated.al:AL",
}
