"""A Ray cluster of two cores in tests; it ends with its module."""

import gc
import importlib
import importlib.util
import os
import warnings

import pytest

from tests.helpers import ROOT

if importlib.util.find_spec("ray") is not None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # those of Ray Serve's own code
        importlib.import_module("ray.serve")


@pytest.fixture(scope="module")
def cluster():
    """The address of a cluster of its own, whose processes find the tests' helpers."""
    import ray

    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Ray's own, while it starts and stops
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        patch.setenv("PYTHONPATH", os.pathsep.join(paths))
        # The proxy sends a session elsewhere when its replica says too late how much it has to do.
        # The default, 0.1 s, passes where tests run side by side.
        for name in ("QUEUE_LENGTH", "MAX_QUEUE_LENGTH"):
            patch.setenv(f"RAY_SERVE_{name}_RESPONSE_DEADLINE_S", "20")
        ray.init(
            address="local",
            num_cpus=2,
            object_store_memory=100 * 2**20,
            include_dashboard=False,
            logging_level="warning",
        )
        try:
            yield ray.get_runtime_context().gcs_address
        finally:
            ray.shutdown()
            gc.collect()  # here, where what Ray says of the processes that it left is no error
