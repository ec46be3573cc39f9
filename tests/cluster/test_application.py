"""What Ray is told of each pool, and of secrets nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from service.settings import Pool, Settings

pytest.importorskip("ray", reason="needs Ray (make test-cluster)")

# What Ray and its libraries warn of is not ours to settle.
pytestmark = pytest.mark.filterwarnings("default")


def test_a_pool_that_may_grow_is_scaled_by_our_policy() -> None:
    from service.cluster.application import _replica_options

    assert _replica_options(Pool(replicas=2)) == {"num_replicas": 2}
    pool = Pool(replicas=1, max_replicas=3, target_seconds=0.5, up_seconds=7, down_seconds=70)
    config = _replica_options(pool)["autoscaling_config"]
    assert (config.min_replicas, config.max_replicas) == (1, 3)
    assert (config.upscale_delay_s, config.downscale_delay_s) == (7, 70)
    # Ray makes the policy from its name and its arguments, as here.
    config.policy.serialize_policy()
    policy = config.policy.get_policy()(**config.policy.policy_kwargs)
    assert policy.target == 0.5


def test_no_secret_travels_and_access_stays_what_it_was(tmp_path: Path) -> None:
    from service.cluster.application import _without_secrets

    settings = Settings(model_store=tmp_path, admin_key="open-sesame")
    sent = _without_secrets(settings)
    assert "open-sesame" not in json.dumps(sent)
    there = Settings(**sent)
    assert there.anonymous
    assert there.all_keys() == settings.all_keys()
