"""The queue-contrastive loss in Triton: two passes over the bank, logits never in memory.

    statistics   each program streams one split of the bank past one block of rows, once for model and teacher together,
                 and keeps a running (max, sum) of both softmaxes and the running expectation of the model's logits
    combine      adds up the splits of each row: final statistics and the row's loss
    gradient     streams the bank again, forms softmax - alpha * teacher's softmax tile by tile, multiplies by the bank
    reduce       adds up the splits of each row's gradient, adds the positive's share, and takes the temperature's part
    finish       one program: mean loss, gradient of the temperature

Direction 0 is image to text, 1 is text to image; both are in every launch. Split 0 of the bank is the batch's own
teacher features, where the positives of the plain loss are; the other splits are ranges of the queue, so the bank is
never concatenated. All sums have one order: no atomics, the same bits twice. Temperature and alpha stay on the device.

Why a positive is not simply another column of the tile: it is near -1 + alpha there, and rounding it to bf16 costs more
than all other columns together. Rows of the gradient sum to zero, so its coefficient is minus the fp32 sum of the rest.
With several positives a row (`ids`) the tile is instead multiplied in two bf16 pieces.
"""

import torch
import triton

from albef_ds.kernels import launch
from albef_ds.kernels import queue_contrastive_kernels as kernels

STATISTICS = 7  # max and sum of the model, max and sum of the teacher, expectation, sum over and number of positives


def forward(
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
):
    """Arguments and results of the operator in `queue_contrastive.py`; ValueError: D above 512, fp64 queues, no GPU."""
    launch.check_device(image_feat.device)
    (batch, dim), length, device = image_feat.shape, image_queue.shape[0], image_feat.device
    if dim > launch.MAX_DIM:
        raise ValueError(f"the Triton kernels take features of D <= {launch.MAX_DIM}, got {dim}; use impl='torch'")
    if image_queue.dtype not in launch.DTYPES:
        raise ValueError(f"the Triton kernels take queues in fp16, bf16 or fp32, got {image_queue.dtype}")
    features = _operands((image_feat, text_feat, image_feat_m, text_feat_m), image_queue.dtype)
    image_queue, text_queue = image_queue.contiguous(), text_queue.contiguous()
    plan = launch.plan(device, image_queue.dtype, batch, length, dim, with_ids=ids is not None)
    splits = plan.splits + 1  # and the batch itself
    # Pointers that a kernel does not follow are given something of the right type.
    ids_or_any = ids.contiguous() if ids is not None else features[0]
    queue_ids_or_any = queue_ids.contiguous() if queue_ids is not None else ids_or_any
    shared = dict(
        D=dim,
        HAS_IDS=ids is not None,
        HAS_QUEUE_IDS=queue_ids is not None,
        UPCAST=launch.interpreted() and image_queue.dtype == torch.bfloat16,
    )

    def new(*shape):
        return torch.empty(shape, dtype=torch.float32, device=device)

    sims = new(batch, batch), new(batch, batch)
    partial, final, row_loss = new(2, splits, STATISTICS, batch), new(2, 5, batch), new(2, batch)
    bank = (*features, image_queue, text_queue, ids_or_any, queue_ids_or_any, temperature)
    grid = (triton.cdiv(batch, plan.statistics.block_m), splits, 2)
    per_split = launch.columns_per_split(length, plan.splits, plan.statistics)
    kernels.statistics[grid](*bank, *sims, partial, batch, length, per_split, **shared, **plan.statistics.options(dim))
    rows = (triton.cdiv(batch, kernels.COMBINE_ROWS.value), 2)
    padded_splits = triton.next_power_of_2(splits)
    kernels.combine[rows](
        partial, *sims, alpha, final, row_loss, batch, splits, HAS_IDS=ids is not None, SPLITS=padded_splits
    )
    loss = new()
    if not with_grad:
        kernels.finish[(1,)](row_loss, row_loss, temperature, loss, loss, batch, WITH_GRAD=False)
        return loss, *sims, new(0), new(0), new(0)

    pieces, rest, slope = new(2, splits, batch, dim), new(2, splits, batch), new(2, splits, batch)
    grid = (triton.cdiv(batch, plan.gradient.block_m) * plan.gradient.chunks(dim), splits, 2)
    per_split = launch.columns_per_split(length, plan.splits, plan.gradient)
    kernels.gradient[grid](
        *bank, final, pieces, rest, slope, batch, length, per_split, **shared, **plan.gradient.options(dim)
    )
    gradients, row_slope, d_temperature = (new(batch, dim), new(batch, dim)), new(2, batch), new(*temperature.shape)
    kernels.reduce[(batch, 2)](
        features[3], features[2], temperature, *sims, final, pieces, rest, slope, *gradients, row_slope, batch, splits,
        D=dim, HAS_IDS=ids is not None, BLOCK_D=triton.next_power_of_2(dim), SPLITS=min(16, padded_splits),
    )  # fmt: skip
    kernels.finish[(1,)](row_loss, row_slope, temperature, loss, d_temperature, batch, WITH_GRAD=True)
    return loss, *sims, *gradients, d_temperature


def _operands(features, dtype):
    """The four features contiguous and in `dtype`; those that need converting are converted in one go."""
    if all(feat.dtype == dtype for feat in features):
        return tuple(feat.contiguous() for feat in features)
    if len({feat.dtype for feat in features}) == 1:
        return tuple(torch.stack(features).to(dtype).unbind(0))
    return tuple(feat.to(dtype).contiguous() for feat in features)
