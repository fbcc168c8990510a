"""Fits of profiles: never negative, monotone, exact where the truth lies in their columns, honest about the rest."""

import dataclasses
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_llmpq.cluster.devices import DeviceType
from ds_llmpq.cost.fit import columns, fit_profile, read_model, unit_roofline
from ds_llmpq.cost.fitted import FittedCosts, load_model
from ds_llmpq.cost.latency import RooflineCosts
from ds_llmpq.cost.linktable import Message, fit_link, read_links, write_links
from ds_llmpq.cost.profile import Point, Profile, Sample, append, current_setup, read_profile, write_header
from ds_llmpq.errors import UserError
from ds_llmpq.models.shape import ModelShape
from ds_llmpq.quant.kernels.dequantize import DEQUANTIZE
from ds_llmpq.quant.packing import Groups
from ds_llmpq.research.published_costs import KERNEL

SHAPE = ModelShape.from_config(
    {
        "model_type": "llama",
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 2048,
    }
)
SETUP = current_setup(SHAPE, "float32", DEQUANTIZE, Groups())
CORE = DeviceType("core", "cpu", 0, 2e10, {"float32": 1e11}, 1e-4, (2, 3, 4, 8, 16), None, "measured: here")


def sample(part, phase, bits, batch, length, seconds, turn=0):
    return Sample(Point("core", part, phase, bits, batch, length), turn, 5, 5, seconds, seconds, 0.01)


def random_profile(seed, noise=0.5):
    """Times that a machine with very unsteady kernels might give."""
    generator = random.Random(seed)
    samples = []
    for bits in (4, 16):
        for batch in (1, 2, 4, 8):
            for length in (16, 32, 64):
                for phase in ("prefill", "decode"):
                    work = 1e-5 * batch * (length if phase == "prefill" else 1) + 1e-6 * batch * length
                    seconds = (work + 1e-4) * generator.uniform(1 - noise, 1 + noise)
                    samples.append(sample("layer", phase, bits, batch, length, seconds))
    for batch in (1, 4, 8):
        for part, phase, length in (("embed", "prefill", 64), ("embed", "decode", 1), ("head", "decode", 1)):
            samples.append(sample(part, phase, 0, batch, length, 1e-5 * batch * generator.uniform(0.5, 2)))
        for part in ("first", "middle", "last"):
            for phase in ("prefill", "decode"):
                samples.append(sample(part, phase, 0, batch, 1, 1e-4 * generator.uniform(0.5, 2)))
    return Profile(SETUP, tuple(samples))


def costs(profile, kind=CORE):
    return FittedCosts(kind, fit_profile(profile, SHAPE), RooflineCosts(kind, SHAPE, "float32"))


def test_rows_may_take_longer_where_there_are_many():
    """As torch's do on CPUs, beyond what their caches hold."""

    def true_seconds(rows):
        return 1e-5 * rows + 1e-5 * max(0, rows - 1024)

    sizes = [(1, 16), (1, 64), (8, 64), (32, 64), *((batch, 256) for batch in (1, 2, 4, 8, 16))]
    samples = tuple(sample("layer", "prefill", 16, *size, true_seconds(size[0] * size[1])) for size in sizes)
    predict = costs(Profile(SETUP, samples)).prefill_seconds
    for batch, length in [(2, 154), (4, 154), (8, 154), (16, 154)]:
        assert predict(16, batch, length) == pytest.approx(true_seconds(batch * length), rel=0.06)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 30),
    st.sampled_from([4, 8, 16]),
    st.integers(1, 64),
    st.integers(1, 300),
    st.integers(0, 16),
    st.integers(0, 200),
)
def test_predictions_are_positive_and_monotone(seed, bits, batch, length, more_rows, more_tokens):
    """In batch, prompt and past, within the profiled range and far outside it; 8 bits come from the roofline."""
    model = PROFILES.setdefault(seed, costs(random_profile(seed)))
    for seconds in (model.prefill_seconds, model.decode_seconds):
        here = seconds(bits, batch, length)
        assert here > 0
        assert seconds(bits, batch + more_rows, length) >= here * (1 - 1e-12)
        assert seconds(bits, batch, length + more_tokens) >= here * (1 - 1e-12)
    assert model.embed_seconds(batch + more_rows, length) >= model.embed_seconds(batch, length) * (1 - 1e-12) > 0
    assert model.head_seconds(batch + more_rows) >= model.head_seconds(batch) * (1 - 1e-12) > 0
    over = model.pass_overhead("decode", batch, 1)
    assert min(over.first, over.middle, over.last) >= 0


PROFILES = {}


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([2, 3, 4, 8, 16]),
    st.integers(1, 64),
    st.integers(1, 300),
    st.integers(0, 16),
    st.integers(0, 200),
    st.sampled_from([DEQUANTIZE, KERNEL]),
)
def test_the_roofline_is_positive_and_monotone(bits, batch, length, more_rows, more_tokens, kernel):
    roofline = RooflineCosts(CORE, SHAPE, "float32", kernel=kernel)
    for seconds in (roofline.prefill_seconds, roofline.decode_seconds):
        assert seconds(bits, batch + more_rows, length) >= seconds(bits, batch, length) > 0
        assert seconds(bits, batch, length + more_tokens) >= seconds(bits, batch, length)


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_a_truth_within_the_columns_is_found(phase):
    unit = unit_roofline(SHAPE, SETUP)
    weights = [2e-4, 1.5, 0.0, 3.0, 0.5, 2.0, 1e-5, 0.0, 1e-4, 0.0, 0.0, 0.0, 8e-6]

    def truth(batch, length):
        return sum(w * v for w, v in zip(weights, columns(unit, "layer", phase, 16, batch, length), strict=True))

    points = [(batch, length) for batch in (1, 2, 3, 4, 8, 16) for length in (16, 64, 128, 256)]
    samples = [sample("layer", phase, 16, *point, truth(*point)) for point in points]
    model = costs(Profile(SETUP, tuple(samples)))
    seconds = model.prefill_seconds if phase == "prefill" else model.decode_seconds
    for batch, length in ((6, 100), (12, 40), (1, 200)):
        assert seconds(16, batch, length) == pytest.approx(truth(batch, length), rel=0.02)
    fit = model.model.get("core", "layer", phase, 16)
    assert fit.mean_error < 0.02


def test_unprofiled_bits_types_and_ranges_are_said():
    model = costs(random_profile(1))
    assert model.prefill_seconds(8, 2, 32) == RooflineCosts(CORE, SHAPE, "float32").prefill_seconds(8, 2, 32)
    assert model.provenance.startswith("fitted (")
    assert "; 8 bits roofline)" in model.provenance
    model.decode_seconds(16, 4, 60)
    assert len(model.notes) == 1
    model.decode_seconds(16, 4, 500)
    model.decode_seconds(16, 16, 60)
    assert len(model.notes) == 2, "however many sizes are asked for"
    assert model.notes[1].startswith("core decode: times of 4 to 16 sequences of 60 to 500 tokens are extrapolated")
    other = costs(random_profile(1), dataclasses.replace(CORE, name="other"))
    assert other.provenance == "roofline (the profile has no other)"
    narrow = dataclasses.replace(model, device_type=dataclasses.replace(CORE, bits=(16,)))
    assert narrow.prefill_seconds(4, 1, 1) is None


def test_rounds_become_one_number_that_a_disturbance_does_not_move():
    for part, expected in (("layer", 1.0), ("last", 1.1)):
        rounds = enumerate((1.1, 9.0, 1.0))
        samples = [sample(part, "decode", 16, 1, 16, seconds, turn) for turn, seconds in rounds]
        (merged,) = Profile(SETUP, tuple(samples)).measured()
        assert (merged.seconds, merged.rounds) == (expected, 3)
        assert merged.spread == pytest.approx(8.0)


def test_devices_timed_together_count_by_their_mean():
    samples = [sample("layer", "decode", 16, 1, 16, seconds, turn) for turn, seconds in ((0, 1.0), (0, 1.5), (1, 9.0))]
    (merged,) = Profile(SETUP, tuple(samples)).measured()
    assert merged.seconds == 1.25


def write(path, setup=SETUP, seed=1):
    write_header(path, setup, {"date": "2026-01-01"})
    append(path, random_profile(seed).samples)
    return path


def test_a_profile_file_reads_back(tmp_path):
    file = write(tmp_path / "profile.csv")
    found, made = read_profile(file), random_profile(1)
    assert (found.setup, found.note) == (SETUP, {"date": "2026-01-01"})
    assert [s.point for s in found.samples] == [s.point for s in made.samples]
    assert [s.median_seconds for s in found.samples] == pytest.approx([s.median_seconds for s in made.samples])
    text = file.read_text()
    file.write_text(text[:-7])  # stopped in the middle of the last row
    assert len(read_profile(file).samples) == len(made.samples) - 1


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('"schema": 1', '"schema": 9', "schema is 9, but must be 1"),
        ("device_type,part", "device,part", "lacks the columns device_type"),
        ("layer,prefill", "cake,prefill", "line 3"),
        ("# {", "# [", "cannot be read as JSON"),
    ],
)
def test_a_damaged_profile_is_refused(tmp_path, old, new, said):
    file = write(tmp_path / "profile.csv")
    file.write_text(file.read_text().replace(old, new, 1))
    with pytest.raises(UserError, match=said):
        read_profile(file)


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("kernel", "openvino", "measured with kernel openvino, but kernel dequantize is in use"),
        ("dtype", "bfloat16", "dtype bfloat16"),
        ("group_size", 128, "group_size 128"),
        ("per_channel_bits", [8], r"measured with per_channel_bits \[8\], but per_channel_bits \[\] is in use"),
        ("lm_head_bits", 8, "measured with lm_head_bits 8, but lm_head_bits 16 is in use"),
        ("libraries", SETUP.libraries | {"torch": "1.0"}, "torch 1.0"),
    ],
)
def test_a_profile_of_another_setup_is_refused_unless_forced(tmp_path, field, value, said):
    write(tmp_path / "profile.csv", dataclasses.replace(SETUP, **{field: value}))
    with pytest.raises(UserError, match=said):
        load_model(tmp_path, SHAPE, SETUP)
    assert load_model(tmp_path, SHAPE, SETUP, force=True).get("core", "layer", "prefill", 16)


def test_a_profile_from_before_per_channel_and_low_bit_heads_has_none(tmp_path, capsys):
    file = write(tmp_path / "profile.csv")
    text = file.read_text()
    assert text.count(', "per_channel_bits": [], "lm_head_bits": 16') == 1
    file.write_text(text.replace(', "per_channel_bits": [], "lm_head_bits": 16', ""))
    assert load_model(tmp_path, SHAPE, SETUP).setup == SETUP
    assert capsys.readouterr().err == ""
    file.write_text(text.replace('"per_channel_bits": [], "lm_head_bits": 16', '"whole_rows": [8], "head_bits": 4'))
    with pytest.raises(UserError, match=r"per_channel_bits \[8\], but per_channel_bits \[\] is in use"):
        load_model(tmp_path, SHAPE, SETUP)
    assert "head_bits (lm_head_bits), whole_rows (per_channel_bits)" in capsys.readouterr().err
    file.write_text(text.replace('"lm_head_bits": 16', '"lm_head_bits": "x"'))
    with pytest.raises(UserError, match="lm_head_bits is 'x'"):
        load_model(tmp_path, SHAPE, SETUP, force=True)
    file.write_text(text.replace('"per_channel_bits": []', '"per_channel_bits": [16]'))
    with pytest.raises(UserError, match=r"quant\.per_channel_bits=\[16\]: list each width once"):
        load_model(tmp_path, SHAPE, SETUP, force=True)


def test_a_profile_of_another_shape_is_refused_even_if_forced(tmp_path):
    write(tmp_path / "profile.csv", dataclasses.replace(SETUP, layer="other"))
    with pytest.raises(UserError, match="another shape"):
        load_model(tmp_path, SHAPE, SETUP, force=True)


def test_a_latency_model_reads_back(tmp_path):
    model = fit_profile(random_profile(3), SHAPE)
    model.write(tmp_path / "latency.json")
    assert read_model(tmp_path / "latency.json") == model
    assert load_model(tmp_path, SHAPE, SETUP) == model
    text = (tmp_path / "latency.json").read_text()
    first = str(model.get("core", "layer", "prefill", 16).weights[0])
    (tmp_path / "latency.json").write_text(text.replace(first, f"-{first}", 1))
    with pytest.raises(UserError, match=r"weights\[0\] is -"):
        read_model(tmp_path / "latency.json")


def test_links_are_latency_and_bandwidth(tmp_path):
    messages = [
        Message("a:0", "a:1", "activation", size, 30, 9.0, 5e-5 + size / 4e9) for size in (8, 1 << 10, 1 << 20, 1 << 22)
    ]
    write_links(tmp_path / "links.csv", [*messages, Message("a:0", "a:1", "token", 8, 30, 9.0, 1.0)])
    link = fit_link(read_links(tmp_path / "links.csv"))
    assert link.latency_seconds == pytest.approx(5e-5)
    assert link.bandwidth_bytes_per_second == pytest.approx(4e9)
    with pytest.raises(UserError, match="two sizes"):
        fit_link(messages[:1])
