"""ONNX files of what inference needs: the whole network, or one file per module.

Both kinds are compared with PyTorch in onnxruntime, at three batch sizes, before they take the place of
an earlier file. Auxiliary networks that only training needs are not in them.
"""

from locc.export.chain import run_manifest
from locc.export.modules import export_onnx_modules
from locc.export.whole import export_onnx

__all__ = ["export_onnx", "export_onnx_modules", "run_manifest"]
