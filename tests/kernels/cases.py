"""Problems for the contrastive loss, and what a result may deviate from the oracle.

The issue's grid is B x M x D x temperature x alpha x ids. `python -m tests.kernels.cases [bf16 fp32 fp16]` runs all of
it through the Triton kernels (20 to 60 minutes a dtype in the interpreter) and prints the worst deviation of each kind;
the tests run a selection in which every pair of values of two parameters occurs.
"""

import itertools
import sys
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from hypothesis import Phase

from albef_ds.kernels import oracle, queue_contrastive_loss

GRID = dict(
    batch=(1, 3, 16, 67),
    length=(5, 64, 1000, 4099),
    dim=(24, 64, 256),
    temperature=(0.001, 0.01, 0.07, 0.5),
    alpha=(0.0, 0.4, 1.0),
    with_ids=(False, True),
)
NO_SHRINKING = (Phase.explicit, Phase.reuse, Phase.generate)  # a failure in the interpreter would shrink for minutes
GRADIENT = {torch.bfloat16: 5e-3, torch.float16: 1e-3, torch.float32: 1e-4}
LOSS = 1e-4


@dataclass(frozen=True)
class Case:
    """One point of the grid; `name` is the test's."""

    batch: int
    length: int
    dim: int
    temperature: float
    alpha: float
    with_ids: bool

    @property
    def name(self):
        ids = "ids" if self.with_ids else "rows"
        return f"B{self.batch}-M{self.length}-D{self.dim}-t{self.temperature}-a{self.alpha}-{ids}"


def full_grid() -> list[Case]:
    """All 1,152 points."""
    return [Case(*values) for values in itertools.product(*GRID.values())]


def pairwise() -> list[Case]:
    """A subset of the grid with every pair of values of two parameters, found greedily, small problems first."""

    def pairs(case):
        values = enumerate(vars(case).values())
        return set(itertools.combinations(values, 2))

    remaining = sorted(full_grid(), key=lambda case: case.batch * case.length * case.dim)
    missing, chosen = set().union(*map(pairs, remaining)), []
    while missing:
        best = max(remaining, key=lambda case: len(pairs(case) & missing))
        missing -= pairs(best)
        chosen.append(best)
    return chosen


@dataclass
class Problem:
    """Tensors of one call. Texts resemble their images and the queue holds near-copies of the batch, so that softmaxes
    are neither flat nor saturated at any temperature: relative errors mean something."""

    tensors: list
    temperature: torch.Tensor
    alpha: float
    ids: torch.Tensor | None = None
    queue_ids: torch.Tensor | None = None

    def run(self, function, exact=False, **options):
        """(loss, sim_i2t, sim_t2i, gradients of image_feat, text_feat, temperature) of fresh leaves; `exact`: in fp64,
        so that not even the gradients are rounded."""
        cast = [x.double() if exact else x.clone() for x in self.tensors]
        leaves = [x.requires_grad_() for x in cast[:2]]
        temperature = (self.temperature.double() if exact else self.temperature.clone()).requires_grad_()
        loss, i2t, t2i = function(*cast, temperature, self.alpha, self.ids, self.queue_ids, **options)
        loss.backward()
        return loss.detach(), i2t, t2i, leaves[0].grad, leaves[1].grad, temperature.grad


def make(case: Case, dtype, device="cpu", seed=0) -> Problem:
    """A problem of this shape, its features rounded to `dtype`."""
    generator = torch.Generator().manual_seed(seed)

    def noise(rows):
        return torch.randn(rows, case.dim, generator=generator, dtype=torch.float64)

    def unit(x):
        return F.normalize(x, dim=-1).to(dtype).to(device)

    base = noise(case.batch)
    owners = torch.arange(case.length) % case.batch
    tensors = [unit(base + noise(case.batch)) for _ in range(4)]
    tensors += [unit(base[owners] + noise(case.length)) for _ in range(2)]
    temperature = torch.tensor([case.temperature], device=device)
    if not case.with_ids:
        return Problem(tensors, temperature, case.alpha)
    ids = torch.arange(case.batch) // 2  # every id twice
    queue_ids = torch.where(torch.rand(case.length, generator=generator) < 0.02, ids[owners], -100)
    return Problem(tensors, temperature, case.alpha, ids.to(device), queue_ids.to(device))


def relative(value, truth) -> float:
    """Norm of the difference over the norm of the truth."""
    truth = truth.double()
    return ((value.double() - truth).norm() / truth.norm().clamp_min(1e-300)).item()


def deviations(problem: Problem, impl: str) -> dict[str, float]:
    """How far `impl` is from the fp64 oracle on the same rounded inputs, and how far plain eager code is.

    Gradients are norm-relative. A gradient below what its own terms round to in fp32 (softmax equal to its target to
    the last bit: nothing is left) is measured against that rounding, and the loss against its size where it exceeds 1.
    """
    truth = problem.run(oracle.queue_contrastive_loss, exact=True)
    ours = problem.run(queue_contrastive_loss, impl=impl)
    eager = problem.run(oracle.queue_contrastive_loss, dtype=None)
    # Terms of a row's gradient: bank rows of length 1 with coefficients of at most 1, divided by 2 B temperature.
    batch = problem.tensors[0].shape[0]
    floor = 1e-3 / (2 * batch**0.5 * problem.temperature.item())

    def errors(result):
        loss, i2t, t2i, *gradients = result
        found = dict(loss=abs(loss.double() - truth[0]).item() / max(1.0, abs(truth[0].item())))
        found["sims"] = max(relative(i2t, truth[1]), relative(t2i, truth[2]))
        size = [max(floor, truth[3].norm().item()), max(floor, truth[4].norm().item())]
        found["features"] = max(
            (g.double() - t.double()).norm().item() / s for g, t, s in zip(gradients[:2], truth[3:5], size, strict=True)
        )
        size = max(floor / problem.temperature.item(), truth[5].abs().item())
        found["temperature"] = (gradients[2].double() - truth[5].double()).abs().item() / size
        return found

    eager_errors = errors(eager)
    return errors(ours) | {f"eager {name}": value for name, value in eager_errors.items()}


def check(problem: Problem, impl: str) -> dict[str, float]:
    """Asserts the project's tolerances and "never worse than eager code in the same type"; returns the deviations."""
    found = deviations(problem, impl)
    limit = GRADIENT[problem.tensors[0].dtype]
    assert found["loss"] <= LOSS, found
    assert found["sims"] <= 1e-5, found
    assert found["features"] <= limit, found
    assert found["temperature"] <= limit, found
    for name in ("loss", "features", "temperature"):
        # Luck of the last digits, which the temperature divides, and one rounding of the result to the features' dtype.
        rounding = 5e-5 + 5e-8 / problem.temperature.item()
        if name == "features" and problem.tensors[0].dtype != torch.float32:
            rounding += limit / 2
        assert found[name] <= found[f"eager {name}"] + rounding, (name, found)
    return found


def main(names) -> int:
    """Runs the whole grid and prints the worst of each deviation."""
    from tests.kernels import conftest

    failed, device = 0, torch.device("cuda" if torch.cuda.is_available() else "cpu")
    assert device.type == "cuda" or conftest.launch.interpreted()
    for dtype in [dict(bf16=torch.bfloat16, fp32=torch.float32, fp16=torch.float16)[name] for name in names]:
        worst, cases = {}, full_grid()
        for number, case in enumerate(cases):
            if number % 96 == 0:
                print(f"{dtype}: {number} of {len(cases)}", file=sys.stderr, flush=True)
            try:
                for name, value in check(make(case, dtype, device), "triton").items():
                    worst[name] = max(worst.get(name, (0.0, "")), (value, case.name))
            except AssertionError as error:
                failed += 1
                print("FAILED", dtype, case.name, error, flush=True)
        print(f"{dtype}: {len(cases)} cases", *(f"{k} {v:.1e} ({at})" for k, (v, at) in worst.items()), sep="\n  ")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:] or ["bf16", "fp32"]))
