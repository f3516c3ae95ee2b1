"""Settings that must stand before a framework is imported, and `require` for packages that may not be there."""

import gc
import importlib.util
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from attend_shared import avoid

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as of what a shell starts in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)

CI = os.environ.get("CI") == "true"

os.environ.setdefault("JAX_NUMPY_DTYPE_PROMOTION", "strict")  # no dtype widens unseen
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # both frameworks share one GPU
if not os.path.exists("/dev/nvidiactl"):
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # one worker, one core
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "agg")
os.environ.pop("ATTEND_AVOID", None)  # what is avoided on this machine is no test's business

# The first example of a JAX property compiles: time says nothing there.
settings.register_profile("attend", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("attend")

# A program that test_triton.py runs in processes of their own: it sets what Triton looks at when it is imported.
collect_ignore = ["interpreter.py"]


def _compile_fast() -> Iterator[None]:
    """JAX's programs are made in less time and run in more, for modules, or tests, whose programs run once."""
    import jax

    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


compile_fast = pytest.fixture(_compile_fast, scope="module")
compile_fast_here = pytest.fixture(_compile_fast)


gc.disable()  # until all is collected


def pytest_collection_finish() -> None:
    """What is loaded by now stays: to search all of it for garbage, time and again, is up to a quarter of a run."""
    gc.freeze()
    gc.enable()


@pytest.fixture
def little_garbage() -> None:
    """For tests that search for garbage time and again: what there is from before is left out of it."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def forget_choices() -> None:
    """A test may put something else in the place of what was chosen before it."""
    avoid.CHOICES.clear()


def require(package: str) -> Path:
    """The folder of an installed package, found without importing it.

    Where the package is not installed the test fails if CI=true, and is otherwise skipped with the reason printed. Call
    it in a test, a fixture, or at the head of a test module.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        reason = f"{package} is not installed: `make test` installs it where it can be had"
        if CI:
            pytest.fail(reason, pytrace=False)
        pytest.skip(reason, allow_module_level=True)
    return Path(spec.origin).parent
