"""Cluster attention: every sample's tokens go through a mixture of K learned transforms.

reference.py          the operation in plain PyTorch, and its equations
op.py                 ``cluster_attention``: choice of backend, autograd, registered operators
checks.py             shapes and dtypes that it takes
problem.py            arguments by name, sizes, and what the forward saves
block_sizes.py        the rule for block sizes, and for whether Hopper's kernels run
plan_forward.py       which launches make a forward, in which order
plan_backward.py      which launches make a backward, in which order
padding.py            widths and ranks that are no multiples of 8
launches_forward.py   launches of the forward's Triton kernels
launches_backward.py  launches of the backward's Triton kernels
launches_hopper.py    launches of Hopper's kernels, of both passes
launch_helpers.py     how launches describe tensors to kernels
triton_forward.py     Triton kernels of the forward; two of them serve the backward, too
triton_backward.py    Triton kernels of the backward alone
triton_helpers.py     device functions that both share
hopper_forward.py     Hopper's kernels of the forward
hopper_backward.py    Hopper's kernels of the backward
hopper_helpers.py     device functions that both share: ring buffer, products, stores
aot.py                attention and mixing as an operator that exported programs hold
"""
