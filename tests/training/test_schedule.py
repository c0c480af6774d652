"""The schedules against an emulation of the reference's rule, and against values worked out by hand."""

import math

import pytest

from albef_ds.training.schedule import alpha_ramp, build_schedule

REFERENCE = {"lr": 1e-4, "min_lr": 1e-5, "warmup_lr": 1e-5, "warmup_steps": 2000}


def emulate_reference(steps_per_epoch, epochs, *, lr, min_lr, warmup_lr, warmup_steps):
    """Learning rate used by every step when it is state of an optimiser that a training loop sets now and then."""
    warmup_epochs = warmup_steps // 100

    def scheduler_value(t):
        if t < warmup_epochs:
            return warmup_lr + t * (lr - warmup_lr) / warmup_epochs
        return min_lr + (lr - min_lr) / 2 * (1 + math.cos(math.pi * (t - warmup_epochs) / epochs))

    current = warmup_lr if warmup_epochs else lr
    used = []
    for epoch in range(epochs):
        if epoch > 0:
            current = scheduler_value(epoch + warmup_epochs)
        for i in range(steps_per_epoch):
            used.append(current)  # the optimiser steps first ...
            if epoch == 0 and i % 100 == 0 and i <= warmup_epochs * 100:
                current = scheduler_value(i // 100)  # ... and only then is its rate set
    return used


@pytest.mark.parametrize(
    ("steps_per_epoch", "epochs", "warmup_steps"),
    [(2500, 3, 2000), (2001, 2, 2000), (2000, 2, 2000), (500, 4, 2000), (1, 5, 100), (100, 3, 100), (250, 6, 0)],
)
def test_reference_schedule_equals_the_emulated_loop_at_every_step(steps_per_epoch, epochs, warmup_steps):
    numbers = REFERENCE | {"warmup_steps": warmup_steps}
    schedule = build_schedule(
        "reference", steps_per_epoch=steps_per_epoch, total_steps=steps_per_epoch * epochs, **numbers
    )
    expected = emulate_reference(steps_per_epoch, epochs, **numbers)
    assert [schedule(step) for step in range(steps_per_epoch * epochs)] == pytest.approx(expected, rel=1e-12)


def test_reference_schedule_jumps_after_an_unfinished_warm_up():
    schedule = build_schedule("reference", steps_per_epoch=500, total_steps=2000, **REFERENCE)
    assert schedule(499) == pytest.approx(2.8e-5)
    assert schedule(500) == pytest.approx(8.68e-5, rel=1e-3)


def test_reference_schedule_ends_near_its_minimum():
    schedule = build_schedule("reference", steps_per_epoch=5000, total_steps=150_000, **REFERENCE)
    assert schedule(149_999) == schedule(145_000) == pytest.approx(1.0246e-5, rel=1e-4)
    assert schedule(10**7) == 1e-5


def test_reference_stairs_take_effect_one_step_late():
    schedule = build_schedule("reference", steps_per_epoch=5000, total_steps=150_000, **REFERENCE)
    assert schedule(0) == schedule(100) == 1e-5
    assert schedule(101) == schedule(200) == pytest.approx(1.45e-5)
    assert schedule(2000) == pytest.approx(9.55e-5)
    assert schedule(2001) == schedule(4999) == 1e-4


def test_paper_schedule_warms_up_linearly_and_reaches_the_minimum_at_the_last_step():
    schedule = build_schedule(
        "paper", lr=1e-4, min_lr=1e-5, warmup_lr=0.0, warmup_steps=1000, steps_per_epoch=700, total_steps=3001
    )
    assert schedule(0) == 0.0
    assert schedule(250) == pytest.approx(2.5e-5)
    assert schedule(1000) == pytest.approx(1e-4)
    assert schedule(2000) == pytest.approx(5.5e-5)  # half of the cosine
    assert schedule(3000) == pytest.approx(1e-5) == schedule(9999)
    assert schedule(2999) > 1e-5
    decay = [schedule(step) for step in range(1000, 3001)]
    assert decay == sorted(decay, reverse=True)


def test_linear_schedule_warms_up_like_the_papers_and_falls_by_equal_steps():
    numbers = dict(lr=1e-4, warmup_lr=1e-5, warmup_steps=1000, steps_per_epoch=700, total_steps=3001)
    linear, paper = (build_schedule(name, min_lr=2e-5, **numbers) for name in ("linear", "paper"))
    assert [linear(step) for step in range(1001)] == [paper(step) for step in range(1001)]
    falls = [linear(step) - linear(step + 1) for step in range(1000, 3000)]
    assert falls == pytest.approx([4e-8] * 2000, rel=1e-6)
    assert linear(3000) == pytest.approx(2e-5) == linear(9999)
    assert build_schedule("linear", min_lr=0.0, **numbers)(3000) == 0.0


def test_constant_schedule_ignores_the_rest():
    schedule = build_schedule(
        "constant", lr=3e-4, min_lr=0, warmup_lr=0, warmup_steps=7, steps_per_epoch=1, total_steps=1
    )
    assert {schedule(step) for step in (0, 1, 1000)} == {3e-4}


def test_alpha_ramps_by_fraction_of_the_first_epoch_only():
    reference = [0.4 * min(1, i / 50) for i in range(50)] + [0.4] * 100
    assert [alpha_ramp(step, 50, 0.4) for step in range(150)] == pytest.approx(reference)
    assert alpha_ramp(0, 50, 0.4, ramp_epochs=0) == 0.4
    assert alpha_ramp(50, 50, 0.4, ramp_epochs=2) == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("cosine", {}, "'cosine'; known: reference, paper, linear, constant"),
        ("paper", {"lr": -1e-4}, "lr is -0.0001"),
        ("paper", {"lr": math.nan}, "lr is nan"),
        ("paper", {"min_lr": 1.0}, "min_lr is 1.0, above lr"),
        ("paper", {"warmup_lr": 1.0}, "warmup_lr is 1.0, above lr"),
        ("paper", {"warmup_steps": -1}, "warmup_steps is -1"),
        ("paper", {"warmup_steps": 1500}, r"warmup_steps \(1500\) must be below total_steps \(1500\)"),
        ("paper", {"total_steps": 0}, "total_steps is 0"),
        ("reference", {"steps_per_epoch": 0}, "steps_per_epoch is 0"),
        ("reference", {"warmup_steps": 150}, "multiple of 100"),
        ("reference", {"epochs": 0}, "epochs is 0"),
    ],
)
def test_nonsense_is_named(name, change, message):
    numbers = {"lr": 1e-4, "min_lr": 1e-5, "warmup_lr": 1e-5, "warmup_steps": 1000}
    with pytest.raises(ValueError, match=message):
        build_schedule(name, **(numbers | {"steps_per_epoch": 500, "total_steps": 1500} | change))


@pytest.mark.parametrize("arguments", [(0, 0, 0.4, 1.0), (0, 10, 1.4, 1.0), (0, 10, 0.4, -1.0)])
def test_alpha_ramp_refuses_nonsense(arguments):
    with pytest.raises(ValueError, match="expected"):
        alpha_ramp(*arguments)
