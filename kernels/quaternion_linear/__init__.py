"""Quaternion linear layers: the Hamilton product and the rotation, with a quarter of the weights.

reference.py        the dense matrix of a layer, and the layer in plain PyTorch
op.py               ``quaternion_linear``: arguments, choice of backend, autograd
checks.py           shapes and dtypes that it takes
form.py             what a layer computes and how its tensors lie in memory
block_sizes.py      the rules for tiles, stages and splits
launches.py         forward and backward of a call: which kernels, in which order
launches_hopper.py  which layers Hopper's kernel takes, and its launches
launches_sums.py    launches of column sums and of the sum over split-K partials
hamilton_terms.py   signs and order of the products that Hopper's kernel accumulates
triton_algebra.py   device functions: products of quaternions of tiles, rotations
triton_forward.py   kernel of the output, and of the gradient of x
triton_backward.py  kernel of the gradients of weights, scale and bias
triton_sums.py      kernels of column sums and of the sum over split-K partials
hopper_kernels.py   Hopper's kernel: large Hamilton products with specialized warps
"""
