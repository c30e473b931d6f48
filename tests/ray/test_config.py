"""deploy/ray-serve.yaml, by Ray Serve's own schema and the arguments of `serve_app`."""

import importlib

import pytest
import yaml

from tests.helpers.manifests import DEPLOY

pytestmark = pytest.mark.ray

ray = pytest.importorskip("llama_jax.ray", reason="needs the ray extra: pip install -e '.[ray]'")


def test_the_configuration_is_ray_serve_s_and_its_arguments_are_ours():
    schema = importlib.import_module("ray.serve.schema")
    config = yaml.safe_load((DEPLOY / "ray-serve.yaml").read_text())
    checked = schema.ServeDeploySchema.model_validate(config)
    [application] = checked.applications
    module, _, name = application.import_path.partition(":")
    built = getattr(importlib.import_module(module), name)(application.args)
    deployment = built._bound_deployment
    assert deployment.name == ray.serving.NAME
    scaling = deployment._deployment_config.autoscaling_config
    assert (scaling.min_replicas, scaling.max_replicas) == (2, 8)
    assert scaling.target_ongoing_requests == application.args["slots"]
    options = deployment.ray_actor_options
    assert (options["num_gpus"], options["num_cpus"]) == (1, 8)
    assert options["runtime_env"]["env_vars"]["PJRT_NPROC"] == "8"
    router = deployment._deployment_config.request_router_config
    assert router.get_request_router_class().__name__ == "ConsistentHashRouter"
