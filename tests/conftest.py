import os

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile("ci", derandomize=True, deadline=None, max_examples=60)
hypothesis.settings.register_profile("dev", deadline=None, max_examples=200)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "dev")


@pytest.fixture
def fresh_compiler():
    """Graphs of one test do not count against the recompile limit of the next."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(autouse=True)
def global_generators_are_left_alone(request):
    """No test of this library may draw from torch's global generator, unless it says so."""
    before = torch.get_rng_state()
    yield
    if "uses_global_generator" not in request.keywords:
        assert torch.equal(torch.get_rng_state(), before)
