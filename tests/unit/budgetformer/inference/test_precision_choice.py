"""The precision of a pass if torch was built without int8."""

from __future__ import annotations

import pytest
import torch
from torch.backends.quantized import _get_qengine_id

from budgetformer.inference import precision_choice
from budgetformer.inference.precision_choice import load_pass
from budgetformer.inference.range_observer import measure_ranges
from tests.support.networks import LARGE, pack, random_items, random_network, small_config


@pytest.mark.parametrize("engine", ["qnnpack", "none"])
@pytest.mark.parametrize("with_onednn", [True, False])
@pytest.mark.parametrize("precision", ["auto", "fastest", "float32", "bfloat16"])
def test_builds_without_int8_use_another_precision(
    monkeypatch: pytest.MonkeyPatch, engine: str, with_onednn: bool, precision: str
) -> None:
    network, items = random_network(small_config(**LARGE)), pack(random_items([5, 3]))
    ranges, steps = measure_ranges(network, [items]), [network.config.num_steps] * 2
    expected = load_pass(network, "float32").run(items, steps).logits
    engines = [_get_qengine_id(engine)]
    monkeypatch.setattr(torch._C, "_supported_qengines", lambda: engines)
    monkeypatch.setattr(torch._C, "_has_mkldnn", with_onednn)
    monkeypatch.setattr(precision_choice, "has_amx", lambda: False)
    chosen = load_pass(network, precision, ranges)
    assert chosen.precision == {"auto": "float32"}.get(precision, chosen.precision)
    assert chosen.precision != "int8"
    logits = chosen.run(items, steps).logits
    assert logits.isfinite().all()
    if chosen.precision == "float32":
        torch.testing.assert_close(logits, expected)
    with pytest.raises(ValueError, match="int8 requires an x86"):
        load_pass(network, "int8", ranges)
