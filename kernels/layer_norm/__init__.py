"""LayerNorm, two LayerNorms in a row, and LayerNorm with the mean over tokens.

reference.py       each operation in plain PyTorch
op.py              ``layer_norm``, ``add_layer_norm``: arguments, choice of backend, autograd
op_twice.py        ``layer_norm_twice``
op_mean.py         ``layer_norm_mean``
checks.py          shapes and dtypes that all of them (and the residual MLP) take
block_sizes.py     the rules for rows, warps, stages and programs of a launch
launches.py        launches of LayerNorm, its backward and the sum of partials
launches_twice.py  launches of two LayerNorms
launches_mean.py   launches of LayerNorm with the mean
triton_kernels.py  kernels of LayerNorm, and device functions that the other two share
triton_twice.py    kernels of two LayerNorms
triton_mean.py     kernels of LayerNorm with the mean
"""
