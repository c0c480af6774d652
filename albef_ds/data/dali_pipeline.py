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


def define(
    *,
    batch: int,
    threads: int,
    depth: int,
    device_id: int | None = None,
    decoder: str = "cpu",
    size: int | None = None,
    hw_decoder_load: float = 0.65,
):
    """DALI's pipeline, defined but not built: its operators and arguments are checked, no GPU and no driver is needed.

    Args:
        batch: images a batch; depth: batches on their way at once.
        device_id: the GPU that it runs on; None: the CPU alone.
        decoder: "mixed": a GPU's, which leaves the images there; or "cpu".
        size: what images are resized to, after which they are mirrored where the input "mirror" says so; None: they
            come as they were cropped.
        hw_decoder_load: the share of a batch that the GPU's hardware decoder gets; its kernels get the rest.

    Returns:
        An nvidia.dali.Pipeline with the inputs "data", "start", "shape" and, with a size, "mirror".
    """
    from nvidia.dali import fn, types
    from nvidia.dali.pipeline import pipeline_def

    @pipeline_def(
        batch_size=batch, num_threads=max(1, threads), device_id=device_id, prefetch_queue_depth=depth, seed=1
    )
    def pipeline():
        images = fn.decoders.image_slice(
            fn.external_source(name="data", dtype=types.UINT8, ndim=1),
            start=fn.external_source(name="start", dtype=types.INT32, ndim=1),
            shape=fn.external_source(name="shape", dtype=types.INT32, ndim=1),
            axis_names="WH",
            device=decoder,
            output_type=types.RGB,
            adjust_orientation=False,  # neither does the reference
            jpeg_fancy_upsampling=True,  # as the CPU's decoders, DALI's and Pillow's, do
            hw_decoder_load=hw_decoder_load,
        )
        if size is None:
            return images
        mirror = fn.external_source(name="mirror", dtype=types.INT32, ndim=0)
        images = fn.resize(images, size=[size, size], interp_type=types.INTERP_CUBIC, antialias=True)
        return fn.flip(images, horizontal=mirror)

    return pipeline()


class DaliDecoder:
    """A queue of `depth` batches of `batch` images: so many are fed before the first result is asked for.

    size: of the images on a GPU, [B, size, size, 3]; on the CPU they come as they were cropped.
    """

    def __init__(
        self, batch: int, size: int, device: torch.device, threads: int, depth: int, hw_decoder_load: float = 0.65
    ):
        self._on_gpu, self._device, self._size = device.type == "cuda", device, size
        self._depth, self._fed = depth, 0
        # What follows decoding is DALI's on a GPU alone: see the head of `dali`.
        gpu = {"device_id": device.index or 0, "decoder": "mixed", "size": size} if self._on_gpu else {}
        self._pipeline = define(batch=batch, threads=threads, depth=depth, hw_decoder_load=hw_decoder_load, **gpu)
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
        except Exception as error:
            raise DecodingFailed(str(error)) from error
        if self._on_gpu:
            taken = self._to_torch(images)
        else:
            taken = [torch.from_numpy(np.array(images.at(i))) for i in range(len(images))]
        self._pipeline.release_outputs()
        return taken

    def _to_torch(self, images) -> Tensor:
        from nvidia.dali.plugin.pytorch import feed_ndarray

        stream = torch.cuda.current_stream(self._device)
        taken = torch.empty(len(images), self._size, self._size, 3, dtype=torch.uint8, device=self._device)
        feed_ndarray(images.as_tensor(), taken, cuda_stream=stream)
        # Given a stream, DALI only starts the copy; the buffer may have another batch in it once it is given back.
        stream.synchronize()
        return taken
