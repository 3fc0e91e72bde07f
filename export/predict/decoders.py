"""Choose what decodes: processes, or the GPU that computes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

from fastadapt.data.decode_on import DecodeOn, check_decode
from fastadapt.data.decode_pool import Reading
from fastadapt.data.pixels import ValueRange
from fastadapt.errors import InputError
from fastadapt.train.devices import parse_device

from .decode_ahead import Decoder, PoolDecoder, open_decoder

# As open_decoder.
OpenDecoder = Callable[
    [Reading | None, ValueRange | None, int, int], AbstractContextManager[Decoder]
]


def decoder_on(place: DecodeOn, device: str) -> OpenDecoder:
    """Return what opens a decoder.

    Args:
        place: ``"cpu"`` for processes, ``"gpu"`` for JPEG files on the GPU.
        device: that computes, as for :func:`fastadapt.train.devices.parse_device`.

    Raises:
        InputError: there is no GPU.
    """
    if place == "cpu":
        return open_decoder
    target = parse_device(device)
    check_decode(place, target)
    from fastadapt.data.gpu_decode import GpuDecoder  # torchvision: not for those who use no GPU

    def open_on_gpu(
        reading: Reading | None, value_range: ValueRange | None, batch: int, workers: int
    ) -> AbstractContextManager[Decoder]:
        if reading is None:
            raise InputError(
                "this model resizes images itself, whose sizes differ: leave out `decode`"
            )
        return PoolDecoder(reading, batch, workers, GpuDecoder(reading, target))

    return open_on_gpu
