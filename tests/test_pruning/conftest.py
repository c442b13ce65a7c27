import jaxtyping
import pytest


@pytest.fixture
def unchecked_shapes():
    """Shape annotations off, as outside of tests: our own errors must hold without them."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)
