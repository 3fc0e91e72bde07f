"""What jobs do in tests. No PyTorch, so that their processes start at once."""

import os
import signal
import time

from fastadapt.errors import InputError


def work(kind, place, device):
    """What a job does here."""
    if kind == "fail":
        raise InputError("no images")
    if kind == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "wait":
        try:
            time.sleep(60)
        except KeyboardInterrupt:
            place.write_text("saved")
            raise
    return kind, device, os.environ.get("CUDA_VISIBLE_DEVICES")
