"""Fastadapt's own runtime: a folded model as a list of fused operations.

steps.py      the operations: their tensors and numbers, and how each is computed
choices.py    which kernels compute them, by the number of rows
model.py      ``FusedModel``, the list; its file, safetensors and JSON
convert.py    a folded model to such a list, or the reason why it has none
vit.py        the steps of timm's vision transformers
convnext.py   the steps of timm's ConvNeXt
float8.py     the same with linear layers in FP8
layers.py     weights as the steps hold them: norms, scales and normalisation folded in
"""
