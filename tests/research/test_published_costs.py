"""Published layer times: the figures themselves, and what is derived from them."""

from dataclasses import replace
from functools import cache

import pytest

from ds_llmpq.cluster.devices import DeviceType
from ds_llmpq.config import read_device_types
from ds_llmpq.errors import UserError
from ds_llmpq.models.shape import ModelShape
from ds_llmpq.research.published_costs import ANCHORS, PUBLISHED_MODEL, PUBLISHED_SHAPE, PublishedCosts

OPT_30B = PUBLISHED_SHAPE


KNOWN = cache(read_device_types)


def device(name, **changes):
    entry = KNOWN()[name]
    fields = {key: value for key, value in vars(entry).items() if key != "bits"}
    return replace(DeviceType(name=name, bits=tuple(entry.bits), **fields), **changes)


def costs(name, shape=OPT_30B, dtype="float16"):
    return PublishedCosts(device(name), shape, dtype)


@pytest.mark.parametrize(("name", "bits"), list(ANCHORS))
def test_at_the_published_size_the_published_time_comes_out(name, bits):
    published = ANCHORS[name, bits]
    assert costs(name).prefill_seconds(bits, 8, 512) == pytest.approx(published.prefill_seconds)
    assert costs(name).decode_seconds(bits, 8, 512) == pytest.approx(published.decode_seconds)


@pytest.mark.parametrize("name", ["t4", "v100", "p100", "a100_40"])
@pytest.mark.parametrize("bits", [3, 4, 8, 16])
def test_more_work_never_takes_less_time(name, bits):
    made = costs(name)
    prefill = [made.prefill_seconds(bits, batch, 512) for batch in (1, 2, 8, 32)]
    decode = [made.decode_seconds(bits, batch, 500) for batch in (1, 8, 32)]
    assert prefill == sorted(prefill)
    assert decode == sorted(decode)
    assert decode[0] > 0
    assert made.prefill_seconds(bits, 8, 128) < made.prefill_seconds(bits, 8, 512)


def test_a_layer_with_a_quarter_of_the_weights_takes_a_quarter_at_low_bits():
    small = ModelShape.from_config(
        {
            **PUBLISHED_MODEL,
            "hidden_size": 3584,
            "ffn_dim": 14336,
            "num_attention_heads": 28,
        }
    )
    assert small.linear_weights * 4 == OPT_30B.linear_weights
    assert costs("t4", small).decode_seconds(4, 8, 512) == pytest.approx(0.0238 / 4)


def test_what_was_not_published_is_assumed_and_says_so():
    p100, a100 = costs("p100"), costs("a100_40")
    assert p100.prefill_seconds(8, 8, 512) == pytest.approx(1.131 * 85.1 / 75.6)
    assert p100.decode_seconds(3, 8, 512) == pytest.approx(0.016 * 4.7 / 5.7)
    assert any("8 bits: assumed" in note for note in p100.notes)
    assert p100.provenance.startswith("published")
    assert a100.provenance.startswith("assumed")
    assert a100.prefill_seconds(16, 8, 512) == pytest.approx(0.0756 * 1.25e14 / 3.12e14)
    assert a100.decode_seconds(4, 8, 512) == pytest.approx(0.0057 * 9.0e11 / 1.555e12)
    assert costs("t4").decode_seconds(2, 8, 512) is None


def test_no_figures_for_a_processor_or_float32():
    with pytest.raises(UserError, match="in float16 only, not of cpu_core"):
        costs("cpu_core")
    with pytest.raises(UserError, match="float32"):
        costs("t4", dtype="float32")
