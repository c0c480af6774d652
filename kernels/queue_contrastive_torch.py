"""The queue-contrastive loss in PyTorch: every device, logits held in memory, gradient written out by hand.

The same rows-sum-to-zero form as the Triton kernels: the gradient of a row's logits sums to zero, so the coefficient of
its positives follows from those of the negatives. Near convergence that keeps digits which 1 - softmax loses.
"""

import torch


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
    """Arguments and results of the operator in `queue_contrastive.py`."""
    work = torch.promote_types(image_queue.dtype, torch.float32)

    def operand(feat):
        return feat.to(image_queue.dtype).to(work)

    tau, alpha = temperature.to(work).reshape(()), alpha.to(work).reshape(())
    image, text, image_m, text_m = map(operand, (image_feat, text_feat, image_feat_m, text_feat_m))
    pos = _positives(ids, queue_ids, image_queue.shape[0])
    i2t, sim_i2t, *d_i2t = _direction(image, image_m, (text_m, text_queue.to(work)), tau, alpha, pos, with_grad)
    t2i, sim_t2i, *d_t2i = _direction(text, text_m, (image_m, image_queue.to(work)), tau, alpha, pos, with_grad)
    loss = (i2t + t2i) / 2
    if not with_grad:
        return loss, sim_i2t, sim_t2i, *(loss.new_empty(0) for _ in range(3))
    return loss, sim_i2t, sim_t2i, d_i2t[0], d_t2i[0], (d_i2t[1] + d_t2i[1]).reshape(temperature.shape)


def _positives(ids, queue_ids, length):
    """[B, B + M] bool, or None where row i has the one positive i."""
    if ids is None:
        return None
    if queue_ids is None:
        in_queue = torch.zeros(ids.shape[0], length, dtype=torch.bool, device=ids.device)
    else:
        in_queue = ids[:, None] == queue_ids[None, :]
    return torch.cat([ids[:, None] == ids[None, :], in_queue], dim=1)


def _direction(feat, feat_m, bank, tau, alpha, pos, with_grad):
    """(mean loss, [B, B] logits) of one direction and, `with_grad`, the gradients of half the loss to `feat` and `tau`;
    `bank`: two blocks of rows."""
    batch = feat.shape[0]
    logits = torch.cat([feat @ block.T for block in bank], dim=1).div_(tau)  # [B, B + M]
    soft = torch.cat([feat_m @ block.T for block in bank], dim=1).div_(tau).softmax(dim=1).mul_(alpha)
    sim = logits[:, :batch].clone()
    logits.sub_(logits.amax(dim=1, keepdim=True))
    log_p = logits.log_softmax(dim=1)
    if pos is None:
        hard = log_p.diagonal()
    else:
        hard = torch.where(pos, log_p, 0).sum(1) / pos.sum(1)
    loss = -((soft * log_p).sum(1) + (1 - alpha) * hard).mean()
    if not with_grad:
        return loss, sim
    g = log_p.exp_().sub_(soft)  # softmax - alpha * teacher's softmax; the hard targets are still missing
    if pos is None:
        g.fill_diagonal_(0)
        g.diagonal().copy_(-g.sum(1))
    else:
        count = pos.sum(1, keepdim=True)
        ours = torch.where(pos, g, 0)
        others = torch.where(pos, 0, g).sum(1, keepdim=True)
        g = torch.where(pos, ours - (ours.sum(1, keepdim=True) + others) / count, g)
    d_feat = g[:, :batch] @ bank[0] + g[:, batch:] @ bank[1]
    # S = feat @ bank / tau, hence dS/dtau = -S / tau; rows of g sum to zero, so S may be shifted by its row's maximum.
    d_tau = torch.linalg.vecdot(g, logits).sum() / (-2 * batch * tau)
    return loss, sim, d_feat.div_(tau * (2 * batch)), d_tau
