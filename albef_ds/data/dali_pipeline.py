"""NVIDIA DALI's part of loading: JPEG bytes and crops in, decoded images out, several batches on their way at once.

On a GPU: decoded by its hardware decoder (`mixed`), cropped, resized, mirrored. On the CPU: decoded and cropped only;
what follows is quicker elsewhere (`dali`). The bytes are handed in, not read by DALI's own readers: see `dali`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from albef_ds import optional

MISSING = (
    "NVIDIA DALI is not installed; install it with pip install 'albef_ds[dali]' (on CUDA 12: 'albef_ds[dali-cuda12]'), "
    "or set data.loader=torch"
)


class DecodingFailed(RuntimeError):
    """DALI gave up on one of the batches on their way; the decoder cannot be used any more."""


def dali_available() -> bool:
    return optional.find("dali").available


class DaliDecoder:
    """A queue of `depth` batches of `batch` images: so many are fed before the first result is asked for.

    size: of the images on a GPU, [B, size, size, 3]; on the CPU they come as they were cropped.
    """

    def __init__(
        self, batch: int, size: int, device: torch.device, threads: int, depth: int, hw_decoder_load: float = 0.65
    ):
        from nvidia.dali import fn, types
        from nvidia.dali.pipeline import pipeline_def

        self._on_gpu, self._device, self._size = device.type == "cuda", device, size
        self._depth, self._fed = depth, 0
        device_id = (device.index or 0) if self._on_gpu else None

        @pipeline_def(
            batch_size=batch, num_threads=max(1, threads), device_id=device_id, prefetch_queue_depth=depth, seed=1
        )
        def pipeline():
            data = fn.external_source(name="data", dtype=types.UINT8, ndim=1)
            start = fn.external_source(name="start", dtype=types.INT32, ndim=1)
            shape = fn.external_source(name="shape", dtype=types.INT32, ndim=1)
            images = fn.decoders.image_slice(
                data,
                start=start,
                shape=shape,
                axis_names="WH",
                device="mixed" if self._on_gpu else "cpu",
                output_type=types.RGB,
                adjust_orientation=False,  # neither does the reference
                jpeg_fancy_upsampling=True,  # as the CPU's decoders, DALI's and Pillow's, do
                hw_decoder_load=hw_decoder_load,
            )
            if not self._on_gpu:
                return images
            mirror = fn.external_source(name="mirror", dtype=types.INT32, ndim=0)
            images = fn.resize(images, size=[size, size], interp_type=types.INTERP_CUBIC, antialias=True)
            return fn.flip(images, horizontal=mirror)

        self._pipeline = pipeline()
        self._pipeline.build()

    def feed(
        self, images: Sequence[np.ndarray], crops: Sequence[tuple[int, int, int, int]], mirror: Sequence[bool]
    ) -> None:
        """images: file contents, uint8. crops: (left, top, width, height). Returns at once."""
        boxes = np.array(crops, dtype=np.int32)
        self._fed += 1
        try:
            self._pipeline.feed_input("data", list(images))
            self._pipeline.feed_input("start", np.ascontiguousarray(boxes[:, :2]))
            self._pipeline.feed_input("shape", np.ascontiguousarray(boxes[:, 2:]))
            if self._on_gpu:
                self._pipeline.feed_input("mirror", np.array(mirror, dtype=np.int32))
            if self._fed >= self._depth:  # DALI's first run takes `depth` batches at once
                self._pipeline.schedule_run()
        except Exception as error:  # DALI maps its own errors to several of Python's
            raise DecodingFailed(str(error)) from error

    def result(self) -> Tensor | list[Tensor]:
        """The oldest batch: [B, S, S, 3] uint8 on the GPU, or on the CPU B of [H, W, 3], the caller's own.

        Raises DecodingFailed where an image in any batch on its way cannot be decoded.
        """
        try:
            [images] = self._pipeline.share_outputs()
            if self._on_gpu:
                taken = self._to_torch(images)
            else:
                taken = [torch.from_numpy(np.array(images.at(i))) for i in range(len(images))]
            self._pipeline.release_outputs()
        except Exception as error:
            raise DecodingFailed(str(error)) from error
        return taken

    def _to_torch(self, images) -> Tensor:
        from nvidia.dali.plugin.pytorch import feed_ndarray

        taken = torch.empty(len(images), self._size, self._size, 3, dtype=torch.uint8, device=self._device)
        feed_ndarray(images.as_tensor(), taken, cuda_stream=torch.cuda.current_stream(self._device))
        return taken
