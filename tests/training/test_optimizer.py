"""Which parameters decay, and whose AdamW updates them."""

from __future__ import annotations

import importlib
import sys

import pytest
import torch

from albef_ds import optional
from albef_ds.config import ConfigError, OptimizerConfig
from albef_ds.training.optimizer import build_optimizer, parameter_groups

# The arguments of NVIDIA's class, in its order; it computes PyTorch's AdamW.
FUSED_ADAM = """
import torch

class FusedAdam(torch.optim.AdamW):
    def __init__(self, params, lr=1e-3, bias_correction=True, betas=(0.9, 0.999), eps=1e-8, adam_w_mode=True,
                 weight_decay=0.0, amsgrad=False, set_grad_none=True, capturable=False, master_weights=False):
        assert adam_w_mode and not amsgrad
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
"""
RIGHT = {
    "apex/__init__.py": "",
    "apex/normalization/fused_layer_norm.py": "",
    "apex/optimizers/__init__.py": FUSED_ADAM,
    "amp_C.py": "",
    "fused_layer_norm_cuda.py": "",
}
WRONG = {"apex/__init__.py": "raise SystemExit", "apex/models.py": ""}
CONFIG = OptimizerConfig(lr=1e-2, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.3)


class Small(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.dense, self.norm = torch.nn.Linear(3, 2), torch.nn.LayerNorm(2)
        self.temp = torch.nn.Parameter(torch.full((1,), 0.07))
        self.frozen = torch.nn.Parameter(torch.ones(2, 2), requires_grad=False)

    def forward(self, x):
        return self.norm(self.dense(x)).square().sum() / self.temp.sum()


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Puts made-up packages onto sys.path for as long as the test runs."""

    def put(files: dict[str, str]):
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
        importlib.invalidate_caches()
        optional.find.cache_clear()

    monkeypatch.syspath_prepend(str(tmp_path))
    yield put
    optional.find.cache_clear()
    for name in [name for name in sys.modules if name.split(".")[0] == "apex"]:
        del sys.modules[name]


def test_biases_and_norms_do_not_decay_the_temperature_does():
    module = Small()
    no_decay, decay = parameter_groups(module, 0.3)
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    assert {names[id(p)] for p in decay["params"]} == {"dense.weight", "temp"} and decay["weight_decay"] == 0.3
    assert {names[id(p)] for p in no_decay["params"]} == {"dense.bias", "norm.weight", "norm.bias"}
    assert no_decay["weight_decay"] == 0.0


@pytest.fixture
def with_gpu(monkeypatch):
    """build_optimizer as on a machine with a GPU; what it builds runs here."""

    def build(module, *args):
        with monkeypatch.context() as here:
            here.setattr(torch.cuda, "is_available", lambda: True)
            return build_optimizer(module, CONFIG, *args)

    return build


def trained(build, fused: str) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    module = Small()
    optimizer = build(module, fused)
    for _ in range(3):
        module(torch.randn(4, 3)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return module.state_dict()


def test_apex_gets_the_same_settings_and_groups(install, with_gpu):
    install(RIGHT)
    assert type(with_gpu(Small(), "apex")).__module__ == "apex.optimizers"
    torch.testing.assert_close(trained(with_gpu, "apex"), trained(with_gpu, "torch"))


def test_apex_is_never_taken_unasked(install, with_gpu):
    install(RIGHT)
    assert type(with_gpu(Small())) is torch.optim.AdamW
    assert "apex" not in sys.modules


@pytest.mark.parametrize(
    "files, why",
    [
        (WRONG, "another project"),
        (RIGHT, "runs on a GPU only"),
    ],
)
def test_an_apex_that_cannot_be_used_is_refused(install, monkeypatch, files, why):
    install(files)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=f"optimizer.fused is apex.*{why}"):
        build_optimizer(Small(), CONFIG, "apex")


def test_another_word_is_refused():
    with pytest.raises(ConfigError, match="optimizer.fused: expected torch or apex, got 'deepspeed'"):
        build_optimizer(Small(), CONFIG, "deepspeed")
