"""The method library: one folder a family, one method a file."""

PASSES = {
    "bp": "locc_passes.baseline.bp:BP",
    "dgl": "locc_passes.proxy.dgl:DGL",
}
