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
    "dtp-drl": "locc_passes.target.drl:DTPDRL",
    "ddtp-linear": "locc_passes.target.drl:DDTPLinear",
    "ddtp-rhl": "locc_passes.target.drl:DDTPRHL",
    "fa": "locc_passes.feedback.fa:FA",
    "dfa": "locc_passes.feedback.dfa:DFA",
    "ifa": "locc_passes.feedback.ifa:IFA",
    "ss-usf": "locc_passes.feedback.signs:UniformSigns",
    "ss-brsf": "locc_passes.feedback.signs:BatchwiseRandomSigns",
    "ss-frsf": "locc_passes.feedback.signs:FixedRandomSigns",
    "altmin": "locc_passes.auxiliary_variables.altmin:AltMin",
    "al": "locc_passes.associated.al:AL",
}
