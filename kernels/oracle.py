"""What the kernels must compute, written as the formula is written and in any precision.

Nothing here is fast and nothing here is clever: banks are concatenated, logits are held, autograd differentiates. The
tests compare every implementation with these functions in float64; the benchmarks time them as the eager rival.
"""

import torch


def positives(batch: int, columns: int, ids=None, queue_ids=None, *, device=None, dtype=torch.float64):
    """The hard part of the target, [B, N]: each row is spread evenly over its positives and sums to one.

    Without `ids` row i has the one positive i. With `ids` [B] (and `queue_ids` [N - B]) every column of an equal id is
    a positive; a queue without ids holds no positives.
    """
    if ids is None:
        return torch.eye(batch, columns, device=device, dtype=dtype)
    same = torch.zeros(batch, columns, device=device, dtype=dtype)
    same[:, :batch] = ids[:, None] == ids[None, :]
    if queue_ids is not None:
        same[:, batch:] = ids[:, None] == queue_ids[None, :]
    return same / same.sum(1, keepdim=True)


def one_direction(feat, feat_m, bank, temperature, alpha, target):
    """Loss of one direction (0-d) and its logits [B, N]: soft targets of the teacher, hard ones of `target`."""
    with torch.no_grad():
        soft = torch.softmax(feat_m @ bank.T / temperature, dim=1)
        target = alpha * soft + (1 - alpha) * target
    logits = feat @ bank.T / temperature
    return -(target * torch.log_softmax(logits, dim=1)).sum(1).mean(), logits


def queue_contrastive_loss(
    image_feat,
    text_feat,
    image_feat_m,
    text_feat_m,
    image_queue,
    text_queue,
    temperature,
    alpha,
    ids=None,
    queue_ids=None,
    *,
    dtype=torch.float64,
):
    """The image-text contrastive loss against a queue: equations 1 to 3 and 6 of "Align before Fuse" (2107.07651).

    Arguments and results as in `albef_ds.kernels.queue_contrastive_loss`. All tensors are brought to `dtype` (None
    leaves them as they are, which under autocast is what a plain training script computes); gradients are autograd's.
    """

    def cast(x):
        return x if dtype is None else x.to(dtype)

    batch, columns = image_feat.shape[0], image_feat.shape[0] + image_queue.shape[0]
    temperature = cast(temperature)
    target = positives(batch, columns, ids, queue_ids, device=image_feat.device, dtype=temperature.dtype)
    text_bank = torch.cat([cast(text_feat_m), cast(text_queue)]).detach()
    image_bank = torch.cat([cast(image_feat_m), cast(image_queue)]).detach()
    i2t, sim_i2t = one_direction(cast(image_feat), cast(image_feat_m), text_bank, temperature, alpha, target)
    t2i, sim_t2i = one_direction(cast(text_feat), cast(text_feat_m), image_bank, temperature, alpha, target)
    return (i2t + t2i) / 2, sim_i2t[:, :batch].detach(), sim_t2i[:, :batch].detach()


def hard_negative_probabilities(logits, ids=None):
    """[B, B] fp64: the law that `sample_hard_negatives` draws from, softmax over the valid candidates of each row.

    A candidate is valid unless it is the row itself or carries the row's id. A row without one is all zeros.
    """
    logits = logits.double()
    batch = logits.shape[0]
    own = torch.eye(batch, dtype=torch.bool, device=logits.device)
    if ids is not None:
        own |= ids[:, None] == ids[None, :]
    return torch.softmax(logits.masked_fill(own, float("-inf")), dim=1).nan_to_num(0.0)


def sample_hard_negatives_loop(weights_logits):
    """The usual way, one `multinomial(...).item()` a row: what benchmarks call the loop. Returns a list.

    Raises RuntimeError where all mass sits on the diagonal, as every training script written so does.
    """
    weights = torch.softmax(weights_logits, dim=1).fill_diagonal_(0)
    return [torch.multinomial(row, 1).item() for row in weights]
