import keras
import numpy as np
import plans
import pytest
from hypothesis import HealthCheck
from hypothesis import settings

# Backends compile and allocate on first use, so times vary widely.
settings.register_profile(
    "default",
    deadline=None,
    max_examples=25,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("default")


@pytest.fixture(autouse=True)
def seed():
    keras.utils.set_random_seed(0)


@pytest.fixture(params=plans.DIFFERENT, ids=str)
def plan(request):
    """Runs a test with every form; small models would all be additive."""
    with plans.forced(request.param):
        yield request.param


@pytest.fixture
def rng():
    return np.random.default_rng(0)
