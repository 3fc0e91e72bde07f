"""The residual MLP of a transformer block, and its first half, a product with GELU, on its own.

reference.py        both in plain PyTorch
op.py               ``residual_mlp``, ``linear_gelu``: arguments, choice of backend, autograd
checks.py           shapes and dtypes that they take
block_sizes.py      the rules for tiles and warps of a launch
launches.py         launches of GELU and its backward
launches_hopper.py  which layers Hopper's kernel takes, and its launches
triton_kernels.py   kernels of GELU and its backward, and the function that both are made of
hopper_kernels.py   Hopper's kernel: a product with GELU, or its slope, in the epilogue
"""
