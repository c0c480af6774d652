"""The device side of `queue_contrastive_triton.py`, whose head says what each kernel does and why.

B rows of the batch, N = B + M columns of the bank, D features; all matrices row-major. Every float that is neither a
feature nor a bank is fp32. `final` holds per direction and row: the model's max and 1 / sum, the teacher's max and
alpha / sum, and the target's weight of each positive.
"""

import triton
import triton.language as tl

SIZES = ("B", "M", "per_split", "splits")  # one compilation serves all batches and queues
COMBINE_ROWS: tl.constexpr = tl.constexpr(8)
NOTHING: tl.constexpr = tl.constexpr(-1.0e30)  # a logit that is not there; finite, so that 0 * NOTHING is 0


@triton.jit
def _load(base, rows, limit, d, D: tl.constexpr, UPCAST: tl.constexpr):
    """Rows `rows` of a [limit, D] matrix at features `d`; zeros outside. UPCAST: multiply bf16 as fp32."""
    tile = tl.load(base + rows[:, None] * D + d[None, :], mask=(rows < limit)[:, None] & (d < D)[None, :], other=0.0)
    if UPCAST:
        tile = tile.to(tl.float32)
    return tile


@triton.jit
def _round_bf16(x):
    """fp32 rounded to bf16, nearest even, still fp32: what `.to(tl.bfloat16)` does, save in the interpreter."""
    bits = x.to(tl.uint32, bitcast=True)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)


@triton.jit
def _logits(query, teacher, base, q, t, rows, B, start, columns, end, tau_inv,
            D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
            PRECISION: tl.constexpr, UPCAST: tl.constexpr):  # fmt: skip
    """One tile of the bank against model and teacher: logits [BM, BN] of both, and the tile where it is held whole."""
    tile_base = base + start * tl.full((), D, tl.int64)  # int64: a queue may hold more than 2^31 elements
    limit = end - start
    if BLOCK_K == BLOCK_D:
        bank = _load(tile_base, columns, limit, tl.arange(0, BLOCK_D), D, UPCAST)
        transposed = tl.trans(bank)
        s = tl.dot(q, transposed, input_precision=PRECISION)
        u = tl.dot(t, transposed, input_precision=PRECISION)
    else:
        s = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        u = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, BLOCK_D, BLOCK_K):
            d = k + tl.arange(0, BLOCK_K)
            transposed = tl.trans(_load(tile_base, columns, limit, d, D, UPCAST))
            s = tl.dot(_load(query, rows, B, d, D, UPCAST), transposed, s, input_precision=PRECISION)
            u = tl.dot(_load(teacher, rows, B, d, D, UPCAST), transposed, u, input_precision=PRECISION)
        bank = s  # never read: a chunk of it would not do
    return s * tau_inv, u * tau_inv, bank


@triton.jit
def _select(direction, split, image, text, image_m, text_m, image_queue, text_queue, B, M, per_split):
    """(query, teacher, bank's base, first and last column within it) of one program."""
    if direction == 0:
        query, teacher, own, queue = image, image_m, text_m, text_queue
    else:
        query, teacher, own, queue = text, text_m, image_m, image_queue
    if split == 0:
        base, begin, end = own, 0, B
    else:
        base, begin, end = queue, (split - 1) * per_split, tl.minimum(split * per_split, M)
    return query, teacher, base, begin, end


@triton.jit
def _positives(ids, queue_ids, rows, columns, B, end, split, HAS_QUEUE_IDS: tl.constexpr):
    """[BM, BN] bool, by equal ids; `columns` are counted within the batch (split 0) or the queue."""
    own = tl.load(ids + rows, mask=rows < B, other=-1)
    inside = (rows < B)[:, None] & (columns < end)[None, :]
    if split == 0:
        other = tl.load(ids + columns, mask=columns < end, other=-2)
    elif HAS_QUEUE_IDS:
        other = tl.load(queue_ids + columns, mask=columns < end, other=-2)
    else:
        other = tl.load(ids + columns, mask=columns < 0, other=-2)
        inside = inside & (columns < 0)[None, :]
    return inside & (own[:, None] == other[None, :])


@triton.jit(do_not_specialize=SIZES)
def statistics(
    image, text, image_m, text_m, image_queue, text_queue, ids, queue_ids, tau,
    sim_i2t, sim_t2i, partial, B, M, per_split,
    D: tl.constexpr, HAS_IDS: tl.constexpr, HAS_QUEUE_IDS: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_O: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """sim_i2t, sim_t2i [B, B]; partial [2, splits, 7, B]. Grid: row blocks, splits, directions."""
    split, direction = tl.program_id(1), tl.program_id(2)
    query, teacher, base, begin, end = _select(
        direction, split, image, text, image_m, text_m, image_queue, text_queue, B, M, per_split
    )
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_N)
    tau_inv = 1.0 / tl.load(tau).to(tl.float32)
    if BLOCK_K == BLOCK_D:
        q = _load(query, rows, B, tl.arange(0, BLOCK_D), D, UPCAST)
        t = _load(teacher, rows, B, tl.arange(0, BLOCK_D), D, UPCAST)
    else:
        q, t = query, teacher
    if direction == 0:
        sims = sim_i2t
    else:
        sims = sim_t2i
    s_max = tl.full((BLOCK_M,), NOTHING, tl.float32)
    s_sum = tl.zeros((BLOCK_M,), tl.float32)
    t_max = tl.full((BLOCK_M,), NOTHING, tl.float32)
    t_sum = tl.zeros((BLOCK_M,), tl.float32)
    mean = tl.zeros((BLOCK_M,), tl.float32)  # sum of the teacher's weights * (logit - s_max)
    hard = tl.zeros((BLOCK_M,), tl.float32)  # sum over the positives of (logit - s_max)
    count = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(begin, end, BLOCK_N):
        s, u, _ = _logits(
            query, teacher, base, q, t, rows, B, start, columns, end, tau_inv,
            D, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_K, PRECISION, UPCAST,
        )  # fmt: skip
        here = (start + columns) < end
        if split == 0:
            at = rows[:, None].to(tl.int64) * B + (start + columns)[None, :]
            tl.store(sims + at, s, mask=(rows < B)[:, None] & here[None, :])
        s = tl.where(here[None, :], s, NOTHING)
        u = tl.where(here[None, :], u, NOTHING)
        s_new = tl.maximum(s_max, tl.max(s, 1))
        t_new = tl.maximum(t_max, tl.max(u, 1))
        # A sum of weights * (logit - max) follows its max down: zero weights so far make the first step a no-op.
        mean += t_sum * (s_max - s_new)
        if HAS_IDS:
            positive = _positives(ids, queue_ids, rows, start + columns, B, end, split, HAS_QUEUE_IDS)
            hard += count * (s_max - s_new) + tl.sum(tl.where(positive, s - s_new[:, None], 0.0), 1)
            count += tl.sum(positive.to(tl.float32), 1)
        fade = tl.exp(t_max - t_new)
        weights = tl.exp(u - t_new[:, None])
        s = s - s_new[:, None]
        mean = mean * fade + tl.sum(weights * s, 1)
        t_sum = t_sum * fade + tl.sum(weights, 1)
        s_sum = s_sum * tl.exp(s_max - s_new) + tl.sum(tl.exp(s), 1)
        s_max = s_new
        t_max = t_new
    out = partial + (direction * tl.num_programs(1) + split) * 7 * B + rows
    tl.store(out, s_max, mask=rows < B)
    tl.store(out + B, s_sum, mask=rows < B)
    tl.store(out + 2 * B, t_max, mask=rows < B)
    tl.store(out + 3 * B, t_sum, mask=rows < B)
    tl.store(out + 4 * B, mean, mask=rows < B)
    tl.store(out + 5 * B, hard, mask=rows < B)
    tl.store(out + 6 * B, count, mask=rows < B)


@triton.jit(do_not_specialize=SIZES)
def combine(partial, sim_i2t, sim_t2i, alpha, final, row_loss, B, splits, HAS_IDS: tl.constexpr, SPLITS: tl.constexpr):
    """final [2, 5, B] and row_loss [2, B] from partial [2, splits, 7, B]. Grid: row blocks, directions."""
    direction = tl.program_id(1)
    rows = tl.program_id(0) * COMBINE_ROWS + tl.arange(0, COMBINE_ROWS)
    k = tl.arange(0, SPLITS)
    inside = rows < B
    mask = (k < splits)[:, None] & inside[None, :]
    at = partial + (direction * splits + k)[:, None] * 7 * B + rows[None, :]
    s_maxs = tl.load(at, mask=mask, other=NOTHING)
    s_max = tl.max(s_maxs, 0)
    shift = s_maxs - s_max[None, :]
    s_sum = tl.sum(tl.load(at + B, mask=mask, other=0.0) * tl.exp(shift), 0)
    s_sum = tl.where(inside, s_sum, 1.0)
    t_maxs = tl.load(at + 2 * B, mask=mask, other=NOTHING)
    t_max = tl.max(t_maxs, 0)
    fade = tl.exp(t_maxs - t_max[None, :])
    t_sums = tl.load(at + 3 * B, mask=mask, other=0.0)
    t_sum = tl.where(inside, tl.sum(t_sums * fade, 0), 1.0)
    mean = tl.sum((tl.load(at + 4 * B, mask=mask, other=0.0) + t_sums * shift) * fade, 0) / t_sum
    if HAS_IDS:
        counts = tl.load(at + 6 * B, mask=mask, other=0.0)
        count = tl.where(inside, tl.sum(counts, 0), 1.0)
        hard = tl.sum(tl.load(at + 5 * B, mask=mask, other=0.0) + counts * shift, 0) / count
    else:
        count = tl.full((COMBINE_ROWS,), 1.0, tl.float32)
        if direction == 0:
            sims = sim_i2t
        else:
            sims = sim_t2i
        hard = tl.load(sims + rows.to(tl.int64) * (B + 1), mask=inside, other=0.0) - s_max
    a = tl.load(alpha).to(tl.float32)
    tl.store(row_loss + direction * B + rows, tl.log(s_sum) - a * mean - (1.0 - a) * hard, mask=inside)
    out = final + direction * 5 * B + rows
    tl.store(out, s_max, mask=inside)
    tl.store(out + B, 1.0 / s_sum, mask=inside)
    tl.store(out + 2 * B, t_max, mask=inside)
    tl.store(out + 3 * B, a / t_sum, mask=inside)
    tl.store(out + 4 * B, (1.0 - a) / count, mask=inside)


@triton.jit(do_not_specialize=SIZES)
def gradient(
    image, text, image_m, text_m, image_queue, text_queue, ids, queue_ids, tau,
    final, pieces, rest, slope, B, M, per_split,
    D: tl.constexpr, HAS_IDS: tl.constexpr, HAS_QUEUE_IDS: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_O: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """pieces [2, splits, B, D]: each split's part of (softmax - target) @ bank, positives of the plain loss left out;
    rest, slope [2, splits, B]: the sums of the coefficients used, and of these times (logit - max).
    Grid: row blocks * D / BLOCK_O, splits, directions."""
    split, direction = tl.program_id(1), tl.program_id(2)
    query, teacher, base, begin, end = _select(
        direction, split, image, text, image_m, text_m, image_queue, text_queue, B, M, per_split
    )
    blocks = tl.cdiv(B, BLOCK_M)
    rows = (tl.program_id(0) % blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    chunk = tl.program_id(0) // blocks
    d_out = chunk * BLOCK_O + tl.arange(0, BLOCK_O)
    columns = tl.arange(0, BLOCK_N)
    tau_inv = 1.0 / tl.load(tau).to(tl.float32)
    if BLOCK_K == BLOCK_D:
        q = _load(query, rows, B, tl.arange(0, BLOCK_D), D, UPCAST)
        t = _load(teacher, rows, B, tl.arange(0, BLOCK_D), D, UPCAST)
    else:
        q, t = query, teacher
    inside = rows < B
    at = final + direction * 5 * B + rows
    s_max = tl.load(at, mask=inside, other=0.0)
    s_scale = tl.load(at + B, mask=inside, other=0.0)
    t_max = tl.load(at + 2 * B, mask=inside, other=0.0)
    t_scale = tl.load(at + 3 * B, mask=inside, other=0.0)
    if HAS_IDS:
        share = tl.load(at + 4 * B, mask=inside, other=0.0)
    dtype = image_queue.dtype.element_ty
    # fp16 has no exponents for probabilities of 1e-5: lift them, the largest possible coefficient stays in range.
    lift: tl.constexpr = 16384.0 if image_queue.dtype.element_ty == tl.float16 else 1.0
    acc = tl.zeros((BLOCK_M, BLOCK_O), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    pull = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(begin, end, BLOCK_N):
        s, u, bank = _logits(
            query, teacher, base, q, t, rows, B, start, columns, end, tau_inv,
            D, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_K, PRECISION, UPCAST,
        )  # fmt: skip
        s = s - s_max[:, None]
        g = tl.exp(s) * s_scale[:, None] - tl.exp(u - t_max[:, None]) * t_scale[:, None]
        keep = ((start + columns) < end)[None, :]
        if HAS_IDS:
            positive = _positives(ids, queue_ids, rows, start + columns, B, end, split, HAS_QUEUE_IDS)
            g = tl.where(positive, g - share[:, None], g)
        else:
            keep = keep & ((split > 0) | (rows[:, None] != (start + columns)[None, :]))
        g = tl.where(keep, g, 0.0)
        total += tl.sum(g, 1)
        pull += tl.sum(g * s, 1)
        g = g * lift
        if BLOCK_K != BLOCK_D or BLOCK_O != BLOCK_D:
            bank = _load(base + start * tl.full((), D, tl.int64), columns, end - start, d_out, D, UPCAST)
        if UPCAST:
            high = _round_bf16(g)
        else:
            high = g.to(dtype)
        acc = tl.dot(high, bank, acc, input_precision=PRECISION)
        if HAS_IDS and dtype != tl.float32:
            low = g - high.to(tl.float32)
            if UPCAST:
                low = _round_bf16(low)
            else:
                low = low.to(dtype)
            acc = tl.dot(low, bank, acc, input_precision=PRECISION)
    part = direction * tl.num_programs(1) + split
    out = pieces + (part * B + rows)[:, None].to(tl.int64) * D + d_out[None, :]
    tl.store(out, acc * (1.0 / lift), mask=inside[:, None] & (d_out < D)[None, :])
    if chunk == 0:
        tl.store(rest + part * B + rows, total, mask=inside)
        tl.store(slope + part * B + rows, pull, mask=inside)


@triton.jit(do_not_specialize=SIZES)
def reduce(
    text_m, image_m, tau, sim_i2t, sim_t2i, final, pieces, rest, slope, d_image, d_text, row_slope, B, splits,
    D: tl.constexpr, HAS_IDS: tl.constexpr, BLOCK_D: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """d_image, d_text [B, D]: gradients of the loss to the features; row_slope [2, B]: sum over the bank of the
    gradient to a logit times the logit, before division by 2 B. Grid: rows, directions."""
    row, direction = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if direction == 0:
        own, sims, out = text_m, sim_i2t, d_image
    else:
        own, sims, out = image_m, sim_t2i, d_text
    d = tl.arange(0, BLOCK_D)
    k = tl.arange(0, SPLITS)
    acc = tl.zeros((BLOCK_D,), tl.float32)
    totals = tl.zeros((SPLITS,), tl.float32)
    pulls = tl.zeros((SPLITS,), tl.float32)
    for first in range(0, splits, SPLITS):
        part = direction * splits + first + k
        mask = (first + k) < splits
        at = pieces + (part * B + row)[:, None] * D + d[None, :]
        acc += tl.sum(tl.load(at, mask=mask[:, None] & (d < D)[None, :], other=0.0), 0)
        totals += tl.load(rest + part * B + row, mask=mask, other=0.0)
        pulls += tl.load(slope + part * B + row, mask=mask, other=0.0)
    pull = tl.sum(pulls, 0)
    if not HAS_IDS:  # the positive, by the sum of the rest
        total = tl.sum(totals, 0)
        acc -= total * tl.load(own + row * D + d, mask=d < D, other=0.0).to(tl.float32)
        pull -= total * (tl.load(sims + row * B + row) - tl.load(final + direction * 5 * B + row))
    tl.store(out + row * D + d, acc / (2.0 * B * tl.load(tau).to(tl.float32)), mask=d < D)
    tl.store(row_slope + direction * B + row, pull)


@triton.jit(do_not_specialize=SIZES)
def finish(row_loss, row_slope, tau, loss, d_tau, B, WITH_GRAD: tl.constexpr):
    """loss []: mean of row_loss [2, B]; d_tau [1]: mean of -row_slope [2, B] / tau. One program."""
    i = tl.arange(0, 1024)
    losses = tl.zeros((1024,), tl.float32)
    slopes = tl.zeros((1024,), tl.float32)
    for start in range(0, 2 * B, 1024):
        mask = start + i < 2 * B
        losses += tl.load(row_loss + start + i, mask=mask, other=0.0)
        if WITH_GRAD:
            slopes += tl.load(row_slope + start + i, mask=mask, other=0.0)
    tl.store(loss, tl.sum(losses, 0) / (2.0 * B))
    if WITH_GRAD:
        tl.store(d_tau, -tl.sum(slopes, 0) / (2.0 * B * tl.load(tau).to(tl.float32)))
