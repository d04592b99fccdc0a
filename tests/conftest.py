"""What every test may rely on: a fixed seed, restored defaults, and GPU tests only where there is a GPU."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings

from runtime.tape import TapeRecorder

# "ci" draws the same examples in every run; "nightly" draws ten thousand new ones (`make property`).
settings.register_profile(
    "ci",
    max_examples=40,
    derandomize=True,
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
    phases=[phase for phase in Phase if phase is not Phase.explain],  # compiles a hundred programs more
)
settings.register_profile("nightly", parent=settings.get_profile("ci"), max_examples=5010, derandomize=False)
settings.load_profile(os.environ.get("LOCC_PROFILE", "ci"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `gpu` where no CUDA device is present."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(skip)


@pytest.fixture(scope="module")
def visits_and_records_on_the_cpu() -> Iterator[None]:
    """Let modules visit the CPU, and steps be recorded there, where a GPU is what that is for."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("locc.compiler.device_for", lambda model: torch.device("cpu"))
        patch.setattr("locc.compiler.recorder_for", lambda device: TapeRecorder())
        yield


@pytest.fixture(autouse=True)
def _reproducible() -> Iterator[None]:
    """Seed PyTorch before each test and undo what a test may change for the whole process."""
    dtype, threads, grad = torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled()
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(dtype)
    torch.set_grad_enabled(grad)
    torch.use_deterministic_algorithms(deterministic)
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
