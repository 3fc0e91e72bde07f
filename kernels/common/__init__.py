"""The parts that all operations share.

dispatch.py       which backend runs a call, on which GPUs kernels run, and in which dtype
launcher.py       launches prepared for a size, and what a GPU has
compile_ahead.py  kernels compile in parallel threads before their first launch
hopper.py         the import of Hopper's kernels, on first use
gluon_hopper.py   Gluon under the names of every Triton, and the ring buffer
reductions.py     sums that Triton kernels share
side_stream.py    matrix products on a side stream
tuning.py         block sizes that ``fastadapt bench --tune`` measured
arithmetic.py     integer arithmetic on the host
"""
