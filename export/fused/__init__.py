"""Fastadapt's own runtime: a folded model as a list of fused operations.

steps.py      the operations: their tensors and numbers, and how each is computed
model.py      ``FusedModel``, the list; its file, safetensors and JSON
convert.py    a folded model to such a list, or the reason why it has none
vit.py        the steps of timm's vision transformers
convnext.py   the steps of timm's ConvNeXt
float8.py     the same with linear layers in FP8

Which kernels compute them, and how weights are folded, stands in ``fastadapt.fusion``: training's
frozen backbone has the same pieces.
"""
