"""Image-text contrastive loss of a batch against a long queue of earlier features.

The mathematics is that of "Align before Fuse" (arXiv 2107.07651, section 3.2 and 3.3; models/model_pretrain.py and
models/model_retrieval.py of the public code). With the bank = [teacher's features of this batch, queue], S the model's
logits and T = alpha * softmax(teacher's logits) + (1 - alpha) * positives, the loss is the mean over rows and both
directions of -(T * log_softmax(S)).sum(). This file checks arguments and registers the operator; the arithmetic is in
`queue_contrastive_torch.py` and `queue_contrastive_triton.py`.

The gradient is computed in forward, because the queue is overwritten before backward runs, and is scaled in backward.
"""

import importlib.util

import torch
from torch import Tensor

from albef_ds.kernels import queue_contrastive_torch

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
IMPLS = ("auto", "triton", "torch")
MAX_TRITON_DIM = 512
HAS_TRITON = importlib.util.find_spec("triton") is not None


def queue_contrastive_loss(
    image_feat: Tensor,
    text_feat: Tensor,
    image_feat_m: Tensor,
    text_feat_m: Tensor,
    image_queue: Tensor,
    text_queue: Tensor,
    temperature: Tensor,
    alpha: float | Tensor,
    ids: Tensor | None = None,
    queue_ids: Tensor | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Contrastive loss of images and texts with soft targets from a teacher, over batch and queue.

    Args:
        image_feat, text_feat: [B, D] features of the model, unit length. They receive gradients, in their own dtype.
        image_feat_m, text_feat_m: [B, D] features of the teacher, unit length; no gradient.
        image_queue, text_queue: [M, D] teacher features of earlier batches, one dtype; no gradient. May be overwritten
            between forward and backward.
        temperature: [1] (or 0-d), divides the cosine similarities. Receives the gradient of the model's logits alone.
        alpha: weight of the teacher's soft targets, 0 to 1; a float, or a 0-d tensor read on its device
            (under torch.compile a float that changes may compile again).
        ids: [B] int64. Equal ids are positives of each other and share the target equally; None: row i has row i.
        queue_ids: [M] int64 ids of the queue's rows, only together with `ids`; None: the queue holds no positives.
        impl: "triton", "torch", or "auto": Triton for CUDA tensors that it takes (D up to 512), else PyTorch.

    Returns:
        loss: 0-d fp32 in nats, the mean of both directions.
        sim_i2t, sim_t2i: [B, B] fp32, the model's logits against this batch's teacher features, detached.

    Matrix products take their operands in the dtype of the queues (features of another dtype are rounded to it) and
    accumulate in fp32, whether or not autocast is on. float64 throughout is for checks and is PyTorch's alone. The
    gradient itself cannot be differentiated again.

    Raises:
        TypeError: a tensor is not floating point, ids are not int64, or the two queues differ in dtype.
        ValueError: shapes or devices do not fit, or `impl` is unknown or cannot run here (D above 512, no GPU).
    """
    features = dict(image_feat=image_feat, text_feat=text_feat, image_feat_m=image_feat_m, text_feat_m=text_feat_m)
    _check(features, image_queue, text_queue, temperature, ids, queue_ids, impl)
    device = image_feat.device
    if not isinstance(alpha, Tensor) or alpha.device != device:
        # `full` writes on the device; `tensor(..., device=)` would copy from the host and wait for it.
        alpha = torch.full((), float(alpha), dtype=torch.promote_types(image_queue.dtype, torch.float32), device=device)
    if alpha.numel() != 1:
        raise ValueError(f"alpha must be a number or hold one element, got shape {list(alpha.shape)}")
    if impl == "auto":
        fits = image_queue.dtype != torch.float64 and image_feat.shape[1] <= MAX_TRITON_DIM
        impl = "triton" if device.type == "cuda" and fits and HAS_TRITON else "torch"
    wanted = torch.is_grad_enabled() and (
        image_feat.requires_grad or text_feat.requires_grad or temperature.requires_grad
    )
    loss, sim_i2t, sim_t2i, _, _, _ = _op(
        image_feat,
        text_feat,
        image_feat_m.detach(),
        text_feat_m.detach(),
        image_queue.detach(),
        text_queue.detach(),
        temperature,
        alpha.detach(),
        ids,
        queue_ids,
        wanted,
        impl,
    )
    return loss, sim_i2t.detach(), sim_t2i.detach()


@torch.library.custom_op("albef_ds::queue_contrastive", mutates_args=())
def _op(
    image_feat: Tensor,
    text_feat: Tensor,
    image_feat_m: Tensor,
    text_feat_m: Tensor,
    image_queue: Tensor,
    text_queue: Tensor,
    temperature: Tensor,
    alpha: Tensor,
    ids: Tensor | None,
    queue_ids: Tensor | None,
    with_grad: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, sim_i2t, sim_t2i, d loss/d image_feat, d loss/d text_feat, d loss/d temperature), all fp32 (or fp64).

    Without `with_grad` the three gradients are empty and only the first pass over the bank is run.
    """
    if impl == "triton":
        from albef_ds.kernels import queue_contrastive_triton as chosen
    else:
        chosen = queue_contrastive_torch
    with torch.autocast(image_feat.device.type, enabled=False), torch.cuda.device_of(image_feat):
        return chosen.forward(
            image_feat,
            text_feat,
            image_feat_m,
            text_feat_m,
            image_queue,
            text_queue,
            temperature,
            alpha,
            ids,
            queue_ids,
            with_grad,
        )


@_op.register_fake
def _fake(
    image_feat,
    text_feat,
    image_feat_m,
    text_feat_m,
    image_queue,
    text_queue,
    temperature,
    alpha,
    ids,
    queue_ids,
    with_grad,
    impl,
):
    batch, dim = image_feat.shape
    dtype = torch.promote_types(image_queue.dtype, torch.float32)

    def new(*shape):
        return image_feat.new_empty(shape, dtype=dtype)

    if not with_grad:
        return new(), new(batch, batch), new(batch, batch), new(0), new(0), new(0)
    gradients = new(batch, dim), new(batch, dim), new(temperature.shape[0]) if temperature.dim() else new()
    return new(), new(batch, batch), new(batch, batch), *gradients


def _setup_context(ctx, inputs, output):
    loss, *others = output
    ctx.mark_non_differentiable(*others)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*others[2:])
    image_feat, text_feat, temperature = inputs[0], inputs[1], inputs[6]
    ctx.dtypes = image_feat.dtype, text_feat.dtype, temperature.dtype


def _backward(ctx, grad_loss, *_):
    if grad_loss is None:
        return (None,) * 12
    image, text, temperature = (
        (grad_loss * saved).to(dtype) for saved, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
    )
    return image, text, None, None, None, None, temperature, None, None, None, None, None


_op.register_autograd(_backward, setup_context=_setup_context)


def _check(features, image_queue, text_queue, temperature, ids, queue_ids, impl):
    """Refuses what cannot be computed, naming the argument, what it is and what was expected."""
    if impl not in IMPLS:
        raise ValueError(f"impl must be one of {IMPLS}, got {impl!r}")
    image_feat = features["image_feat"]
    if image_feat.dim() != 2 or 0 in image_feat.shape:
        raise ValueError(f"image_feat must be [B, D] with B and D at least 1, got shape {list(image_feat.shape)}")
    (batch, dim), length = image_feat.shape, image_queue.shape[0] if image_queue.dim() else 0
    shapes = {name: [batch, dim] for name in features} | {"image_queue": [length, dim], "text_queue": [length, dim]}
    tensors = dict(features, image_queue=image_queue, text_queue=text_queue)
    if ids is not None:
        tensors["ids"], shapes["ids"] = ids, [batch]
    if queue_ids is not None:
        if ids is None:
            raise ValueError("queue_ids was given without ids: the ids of the batch are needed to find positives")
        tensors["queue_ids"], shapes["queue_ids"] = queue_ids, [length]
    for name, tensor in tensors.items():
        if list(tensor.shape) != shapes[name]:
            raise ValueError(f"{name} has shape {list(tensor.shape)}, expected {shapes[name]}")
        if tensor.device != image_feat.device:
            raise ValueError(f"{name} is on {tensor.device}, image_feat on {image_feat.device}")
        if name.endswith("ids") and tensor.dtype != torch.int64:
            raise TypeError(f"{name} must be int64, got {tensor.dtype}")
        if not name.endswith("ids") and tensor.dtype not in FLOATS:
            raise TypeError(f"{name} must be one of {FLOATS}, got {tensor.dtype}")
    if image_queue.dtype != text_queue.dtype:
        raise TypeError(f"the queues differ in dtype: image {image_queue.dtype}, text {text_queue.dtype}")
    if temperature.numel() != 1 or temperature.dim() > 1 or temperature.device != image_feat.device:
        raise ValueError(
            f"temperature must hold one element on {image_feat.device}, got shape {list(temperature.shape)} on "
            f"{temperature.device}"
        )
    if not temperature.is_floating_point():
        raise TypeError(f"temperature must be floating point, got {temperature.dtype}")
