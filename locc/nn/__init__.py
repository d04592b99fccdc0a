"""Auxiliary networks, built from shapes alone."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from locc.ir.spec import TensorSpec
from locc.nn.bridges import SigmoidMap, build_bridge, build_label_decoder, build_label_encoder
from locc.nn.building import MAX_WEIGHTS, check_shapes, orthogonal_
from locc.nn.contrast import (
    FEATURES,
    PAIR_OBJECTIVES,
    PredictiveCoding,
    gaussian_kernel,
    matrix_loss,
    pair_kernel,
    pair_loss,
    patch_grid,
    supervised_contrast,
)
from locc.nn.conv_heads import CascadeHead, GreedyHead, InfoProHead
from locc.nn.decoders import DenseDecoder, ImageDecoder, PositionDecoder, build_decoder
from locc.nn.feedback import (
    BroadcastFeedback,
    broadcast_feedback,
    draw_broadcast,
    draw_feedback,
    feedback_call,
    feedback_conv,
    feedback_linear,
)
from locc.nn.heads import DGLHead, FixedHead, LinearHead, build_head
from locc.nn.inverses import ACTIVATIONS, Inverse, build_inverse
from locc.nn.labels import one_hot
from locc.nn.layout import Layout, check_boundary, guess_layout, layout_of, pool, positions, regrid, resize
from locc.nn.maps import with_channels
from locc.nn.predsim import PredHead, SimHead, build_pred_head, build_sim_head, sim_loss, similarity_matrix
from locc.nn.readout import Head, Readout, plan_readout
from locc.nn.synthesisers import Synthesiser, build_synthesiser

Factory = Callable[[TensorSpec, TensorSpec], nn.Module]
"""What a user passes to replace an auxiliary network: (from, to) -> module. Every `build_*` here is one;
the second spec is the model's output for heads and synthesisers, the target value for the others."""

__all__ = [
    "ACTIVATIONS",
    "FEATURES",
    "MAX_WEIGHTS",
    "PAIR_OBJECTIVES",
    "BroadcastFeedback",
    "CascadeHead",
    "DGLHead",
    "DenseDecoder",
    "Factory",
    "FixedHead",
    "GreedyHead",
    "Head",
    "ImageDecoder",
    "InfoProHead",
    "Inverse",
    "Layout",
    "LinearHead",
    "PositionDecoder",
    "PredHead",
    "PredictiveCoding",
    "Readout",
    "SigmoidMap",
    "SimHead",
    "Synthesiser",
    "broadcast_feedback",
    "build_bridge",
    "build_decoder",
    "build_head",
    "build_inverse",
    "build_label_decoder",
    "build_label_encoder",
    "build_pred_head",
    "build_sim_head",
    "build_synthesiser",
    "check_boundary",
    "check_shapes",
    "draw_broadcast",
    "draw_feedback",
    "feedback_call",
    "feedback_conv",
    "feedback_linear",
    "gaussian_kernel",
    "guess_layout",
    "layout_of",
    "matrix_loss",
    "one_hot",
    "orthogonal_",
    "pair_kernel",
    "pair_loss",
    "patch_grid",
    "plan_readout",
    "pool",
    "positions",
    "regrid",
    "resize",
    "sim_loss",
    "similarity_matrix",
    "supervised_contrast",
    "with_channels",
]
