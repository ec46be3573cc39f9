"""The shipped Serve config file: Ray reads it, and its arguments are valid settings."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from service.settings import Settings

FILE = Path(__file__).parents[2] / "docker" / "ray" / "serve.yaml"


@pytest.mark.filterwarnings("ignore::pydantic.PydanticDeprecatedSince20")
def test_ray_accepts_the_file_and_the_settings_its_arguments() -> None:
    schema = pytest.importorskip("ray.serve.schema", reason="needs Ray (make test-cluster)")
    config = schema.ServeDeploySchema.model_validate(yaml.safe_load(FILE.read_text()))
    (application,) = config.applications
    pools = Settings(**application.args).ordered_pools()
    assert list(pools) == ["small", "large"]
    assert not pools["small"].computes(3)
    assert pools["large"].computes(12)
