"""The task at its edges: results are defined where the reference divides by zero or dies."""

from __future__ import annotations

import functools
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from albef_ds.model.packing import FusionPlan
from albef_ds.model.spans import Spans
from albef_ds.tasks.pretraining import Pretraining
from tests.golden_cases import most_likely_negative
from tests.tiny import one_by_one, tiny_batch, tiny_model


def build(**changes) -> Pretraining:
    torch.manual_seed(0)
    return Pretraining(tiny_model(**changes), sample_negatives=changes.pop("sample_negatives", most_likely_negative))


def step(task: Pretraining, batch, alpha=0.4) -> dict[str, torch.Tensor]:
    task.start_step(alpha)
    losses = task(batch)
    task.zero_grad()
    sum(losses.values()).backward()
    task.finish_step()
    for name, parameter in task.model.named_parameters():
        assert parameter.grad is not None, f"{name} has no gradient: ZeRO needs one from every rank"
        assert torch.isfinite(parameter.grad).all(), name
    return {name: value.detach() for name, value in losses.items()}


def test_a_batch_of_one_has_no_negatives_and_a_defined_result():
    torch.manual_seed(0)
    task = Pretraining(tiny_model())
    losses = step(task, tiny_batch(1, lengths=[6]))
    assert all(torch.isfinite(v) for v in losses.values())
    # Matching is learnt from the positive pair alone.
    batch = tiny_batch(1, lengths=[6])
    image_embeds, _ = task.model.encode_image(batch.images)
    text_embeds, _ = task.model.encode_text(batch.text)
    zero = torch.zeros(1, dtype=torch.int64)
    logits = task.model.match(text_embeds, batch.text, zero, image_embeds, zero)
    torch.testing.assert_close(losses["itm"], F.cross_entropy(logits, torch.ones(1, dtype=torch.int64)).detach())


def test_rows_without_a_valid_negative_count_for_nothing():
    batch = tiny_batch(4)
    some = torch.tensor([1, -1, 3, -1])
    losses = step(Pretraining(tiny_model(), sample_negatives=lambda logits: some), batch)
    assert torch.isfinite(losses["itm"])
    none = step(Pretraining(tiny_model(), sample_negatives=lambda logits: torch.full((4,), -1)), batch)
    assert torch.isfinite(none["itm"])


def test_a_batch_without_a_masked_token_has_an_mlm_loss_of_zero():
    losses = step(build(), tiny_batch(3, labelled=0.0))
    assert losses["mlm"] == 0.0
    assert torch.isfinite(losses["itc"] + losses["itm"])


@settings(max_examples=20, deadline=None)
@given(
    size=st.integers(1, 6), seed=st.integers(0, 1000), alpha=st.sampled_from([0.0, 0.4, 1.0]), queue=st.integers(6, 40)
)
def test_any_batch_and_queue_give_finite_losses_and_gradients(size, seed, alpha, queue):
    task = build(queue_size=queue)
    for i in range(3):  # the queue wraps
        losses = step(task, tiny_batch(size, seed + i), alpha)
    assert all(torch.isfinite(v) for v in losses.values())
    assert task.queue.pointer.item() == 3 * size % queue


def padded_losses(task: Pretraining, batch, alpha: float) -> dict[str, torch.Tensor]:
    """The same losses in the reference's way: text by text through whole BERTs, four fusion passes, full logits."""
    size = len(batch)
    masked = replace(batch.text, input_ids=batch.masked.input_ids)
    image_embeds, image_feat = task.model.encode_image(batch.images)
    text_embeds, text_feat = task.model.encode_text(batch.text)
    masked_embeds, _ = task.model.encode_text(masked)
    with torch.no_grad():
        image_embeds_m, image_feat_m = task.teacher.encode_image(batch.images)
        _, text_feat_m = task.teacher.encode_text(batch.text)
        masked_embeds_m, _ = task.teacher.encode_text(masked)
    losses, sims = [], []
    for feat, feat_m, bank in (
        (image_feat, image_feat_m, torch.cat([text_feat_m, task.queue.text])),
        (text_feat, text_feat_m, torch.cat([image_feat_m, task.queue.image])),
    ):
        logits, soft = feat @ bank.T / task.model.temp, (feat_m @ bank.T / task.model.temp).softmax(1).detach()
        target = alpha * soft + (1 - alpha) * torch.eye(size, bank.shape[0], dtype=bank.dtype)
        losses.append(-(target * logits.log_softmax(1)).sum(1).mean())
        sims.append(logits[:, :size].detach())
    negative_text, negative_image = (most_likely_negative(s).tolist() for s in sims)
    pairs = (
        [(i, i) for i in range(size)] + [(t, i) for i, t in enumerate(negative_text)] + list(enumerate(negative_image))
    )
    itm_logits = one_by_one(task.model, text_embeds, batch.text, pairs, image_embeds)
    itm = F.cross_entropy(itm_logits, torch.tensor([1] * size + [0] * 2 * size))

    def token_logits(model, embeds, images):
        rows = []
        for i, (start, end) in enumerate(
            zip(batch.text.cu_seqlens[:-1].tolist(), batch.text.cu_seqlens[1:].tolist(), strict=True)
        ):
            spans = Spans.equal(1, end - start, "cpu")
            every = torch.arange(end - start)
            rows.append(model.text_encoder.fuse(embeds[start:end], FusionPlan.aligned(spans), images[i : i + 1], every))
        return model.text_encoder.predict_tokens(torch.cat(rows))  # over the whole vocabulary at every position

    with torch.no_grad():
        soft = token_logits(task.teacher, masked_embeds_m, image_embeds_m).softmax(-1)
    log_p = token_logits(task.model, masked_embeds, image_embeds).log_softmax(-1)
    at = batch.masked.positions
    hard = F.nll_loss(log_p[at], batch.masked.labels)
    distilled = -(soft[at] * log_p[at]).sum(-1).mean()
    return {"itc": sum(losses) / 2, "itm": itm, "mlm": (1 - alpha) * hard + alpha * distilled}


@settings(max_examples=10, deadline=None)
@given(lengths=st.lists(st.integers(2, 10), min_size=2, max_size=5), seed=st.integers(0, 99))
def test_the_packed_step_equals_the_plain_one_in_losses_and_gradients(lengths, seed):
    task = build().double()
    batch = tiny_batch(len(lengths), seed, lengths, labelled=0.6)
    if batch.masked.positions.numel() == 0:
        return
    batch = type(batch)(batch.images.double(), batch.text, batch.masked)
    task.start_step(0.4)
    task.train(False)
    packed = task(batch)
    plain = padded_losses(task, batch, 0.4)
    for name in plain:
        torch.testing.assert_close(
            packed[name].double(), plain[name], atol=1e-9, rtol=1e-8, msg=lambda m, n=name: f"{n}: {m}"
        )
    parameters = [p for p in task.model.parameters() if p.requires_grad]
    found = torch.autograd.grad(sum(packed.values()), parameters, retain_graph=True)
    wanted = torch.autograd.grad(sum(plain.values()), parameters)
    for (name, _), f, w in zip(task.model.named_parameters(), found, wanted, strict=True):
        assert (f - w).norm() <= 1e-7 * max(float(w.norm()), 1e-3), name


def test_three_steps_with_the_triton_kernels_equal_three_with_pytorch():
    """In the interpreter where there is no GPU; the sampler draws from the same seed in both."""
    from albef_ds.kernels import sample_hard_negatives

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    finals = []
    for impl in ("torch", "triton"):
        torch.manual_seed(0)
        sample = functools.partial(sample_hard_negatives, impl=impl)
        task = Pretraining(tiny_model(), sample_negatives=sample, loss_impl=impl).to(device)
        optimizer = torch.optim.SGD(task.model.parameters(), lr=0.1)
        torch.manual_seed(1)
        for i in range(3):
            task.start_step(alpha=0.4)
            losses = task(tiny_batch(5, seed=i).to(device))
            optimizer.zero_grad()
            sum(losses.values()).backward()
            optimizer.step()
            task.finish_step()
        finals.append({**task.state_dict(), **losses})
    for name, value in finals[0].items():
        torch.testing.assert_close(finals[1][name], value, atol=2e-5, rtol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_the_bound_on_mutual_information_is_log_candidates_minus_infonce():
    task = build()
    batch = tiny_batch(4)
    task.start_step(alpha=0.4, measuring=True)
    task.train(False)
    task(batch)
    _, image_feat = task.model.encode_image(batch.images)
    _, text_feat = task.model.encode_text(batch.text)
    _, image_feat_m = task.teacher.encode_image(batch.images)
    _, text_feat_m = task.teacher.encode_text(batch.text)
    labels = torch.arange(4)
    i2t = F.cross_entropy(image_feat @ torch.cat([text_feat_m, task.queue.text]).T / task.model.temp, labels)
    t2i = F.cross_entropy(text_feat @ torch.cat([image_feat_m, task.queue.image]).T / task.model.temp, labels)
    expected = math.log(4 + task.queue.length) - (i2t + t2i).item() / 2
    assert task.measures["mi_bound"].item() == pytest.approx(expected, rel=1e-5)
