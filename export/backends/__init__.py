"""A folded model to one file format each.

- ``onnx``: the fp32 graph that every bundle has, and its variants in half precision.
- ``tensorrt``: an engine of an ONNX file, by TensorRT or TensorRT-RTX.
- ``aotinductor``: a .pt2 of native code, compiled by PyTorch.
- ``fastadapt``: fused operations of this package, for GPUs.
"""
