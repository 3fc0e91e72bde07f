"""ONNX Runtime's own fused attention: a graph's attention as one operator of its contrib domain.

A portable graph holds softmax(scale · q kᵀ) v as two products and a softmax, with the weights of
every pair of tokens in memory between them. ONNX Runtime has an operator for all of it,
``com.microsoft::MultiHeadAttention``, which other runtimes do not know. onnxscript's rewriter finds
the attention and writes the operator. (Its further fusions are left out: the sum of a residual
connection and LayerNorm as one is three times as slow on a CPU as the two.) A graph that is meant
for GPUs gets more of ONNX Runtime's operators (:mod:`export.backends.fused_transformer`).
"""

from __future__ import annotations

from pathlib import Path

from fastadapt.errors import InputError, first_line

from .fused_transformer import fuse_for_gpu
from .onnx import ONE_FILE_LIMIT, strip, write_model

OPERATORS = {("com.microsoft", "MultiHeadAttention"), ("com.microsoft", "Attention")}


def fuse_attention(onnx_file: str | Path, path: str | Path, *, gpu: bool = False) -> int:
    """Write a version of an ONNX file for ONNX Runtime alone, with fused attention.

    Args:
        onnx_file: as :func:`fastadapt.export.export_onnx` wrote it, in any precision.
        path: of the result; nothing is written if there is no attention to fuse.
        gpu: fuse what else is faster on a GPU; the graph is in fp16.

    Returns:
        The number of operators that compute attention.

    Raises:
        InputError: the rewriter fails, with its reason.
    """
    import onnx_ir
    from onnx_ir.passes.common import ShapeInferencePass
    from onnxscript import optimizer
    from onnxscript.rewriter.ort_fusions.sdpa import fuse_sdpa
    from onnxscript.rewriter.ort_fusions.sdpa_via_mha import replace_sdpa_by_mha

    try:
        model = onnx_ir.load(onnx_file)
        ShapeInferencePass()(model)  # the rules compare the shapes of q, k and v
        fuse_sdpa(model, apply_shape_inference=True)
        replace_sdpa_by_mha(model)
        optimizer.optimize(model)  # writes out what was found and is no attention of several heads
        if gpu:
            fuse_for_gpu(model)
    except Exception as error:
        name, reason = Path(onnx_file).name, first_line(error)
        raise InputError(f"the attention of {name} cannot be fused: {reason}") from error
    count = sum((node.domain, node.op_type) in OPERATORS for node in model.graph)
    if count:
        strip(model)
        size = sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value)
        write_model(model, Path(path), external_data=size > ONE_FILE_LIMIT)
    return count
