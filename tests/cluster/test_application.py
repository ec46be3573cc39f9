"""The options of Ray's deployments: scaling of pools, and settings without secrets."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from service.settings import Pool, Settings

pytest.importorskip("ray", reason="needs Ray (make test-cluster)")

# Warnings of Ray and its libraries are not errors.
pytestmark = pytest.mark.filterwarnings("default")


def test_a_pool_with_max_replicas_is_scaled_by_queue_seconds() -> None:
    from service.cluster.application import _replica_options

    assert _replica_options(Pool(replicas=2)) == {"num_replicas": 2}
    pool = Pool(replicas=1, max_replicas=3, target_seconds=0.5, up_seconds=7, down_seconds=70)
    config = _replica_options(pool)["autoscaling_config"]
    assert (config.min_replicas, config.max_replicas) == (1, 3)
    assert (config.upscale_delay_s, config.downscale_delay_s) == (7, 70)
    # Ray makes the policy from its name and arguments in the same way.
    config.policy.serialize_policy()
    policy = config.policy.get_policy()(**config.policy.policy_kwargs)
    assert policy.target == 0.5


def test_settings_are_sent_without_secrets_and_with_the_same_access(tmp_path: Path) -> None:
    from service.cluster.application import _without_secrets

    settings = Settings(model_store=tmp_path, admin_key="open-sesame")
    sent = _without_secrets(settings)
    assert "open-sesame" not in json.dumps(sent)
    received = Settings(**sent)
    assert received.anonymous
    assert received.all_keys() == settings.all_keys()
