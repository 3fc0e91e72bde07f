"""LayerNorm of rows that lack a constant, for the fused runtime's residual stream.

reference.py       the formulation in plain PyTorch
op.py              ``shifted_norm``, the choice of the backend
launches.py        the launch
triton_kernels.py  the kernel
"""
