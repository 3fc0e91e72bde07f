"""Find products on tensor cores whose operands may be overwritten while they are read."""

from __future__ import annotations

import re


def products_left_reading(ttgir: str) -> int:
    """Count asynchronous products with their left operand in registers that are not waited for.

    Triton 3.6 makes them of a left operand that a loop loads and converts, and writes the next one
    into the same registers: on an H100 with two programs on a multiprocessor, NaN.
    """
    count = 0
    product = r"(%\S+) = ttng\.warp_group_dot .*isAsync = true.*: tensor<.* \* "
    for name in re.findall(product, ttgir):
        wait = re.search(rf"warp_group_dot_wait {re.escape(name)}\b.*pendings = (\d+)", ttgir)
        count += wait is not None and int(wait.group(1)) > 0
    return count
