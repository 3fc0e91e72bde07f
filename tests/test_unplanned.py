"""What needs cuDNN gets it; what does not is called without."""

import torch

from fastadapt.unplanned import unplanned


def test_cudnn_is_off_first_and_comes_back():
    calls = []

    def run():
        calls.append(torch.backends.cudnn.enabled)
        if not calls[-1]:
            raise RuntimeError("not implemented")
        return 3

    before = torch.backends.cudnn.enabled
    assert unplanned(run) == 3 and calls == [False, True]
    assert unplanned(lambda: torch.backends.cudnn.enabled) is False
    assert torch.backends.cudnn.enabled is before
