"""The kernels' tests run where they can: on a GPU if there is one, else on the CPU in Triton's interpreter."""

import os

import torch

# Before anything imports Triton: it decides at import whether its own functions are interpreted.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest  # noqa: E402

from albef_ds.kernels import launch  # noqa: E402


@pytest.fixture
def device():
    """The GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def triton_runs():
    """Skips where the Triton kernels cannot run: no GPU, and Triton was imported before it was told to interpret."""
    if not torch.cuda.is_available() and not launch.interpreted():
        pytest.skip("no GPU, and Triton was imported without TRITON_INTERPRET=1")


@pytest.fixture(params=["torch", "triton"])
def impl(request):
    """Both implementations, one after the other."""
    if request.param == "triton":
        request.getfixturevalue("triton_runs")
    return request.param


@pytest.fixture(scope="session", autouse=True)
def own_plans(tmp_path_factory):
    """Each process of tests has a cache file of its own, at first none: no plan of the developer's or of another's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ALBEF_DS_CACHE", str(tmp_path_factory.mktemp("plans")))
        launch.reread()
        yield
    launch.reread()


@pytest.fixture
def cache_file(tmp_path, monkeypatch):
    """The cache file of one test."""
    monkeypatch.setenv("ALBEF_DS_CACHE", str(tmp_path))
    launch.reread()
    yield launch.cache_file()
    launch.reread()


@pytest.fixture(autouse=True)
def seeded():
    """Same random numbers whatever ran before, and no plan left over from another test."""
    torch.manual_seed(20210716)
    yield
    launch.force()
