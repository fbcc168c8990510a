"""How far fitted times are off at points the fit was not told of.

    ds-llmpq profile model.path=MODEL workload=demo out=PROFILE
    python scripts/bench/fidelity.py MODEL PROFILE [--held-out 0.25] [--repeats 8]

Draws a share of a profile's points, fits the others, predicts the drawn ones, and does so again with other draws.
Corner points (the smallest and largest micro-batch and length) stay in, for a held-out corner is an extrapolation.
"""

import argparse
import random

from ds_llmpq.cost.fit import columns, fit_profile, unit_roofline
from ds_llmpq.cost.profile import read_profile
from ds_llmpq.models.shape import read_shape
from ds_llmpq.report.fidelity import TimePair, format_errors, verdict


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("profile")
    parser.add_argument("--held-out", type=float, default=0.25)
    parser.add_argument("--repeats", type=int, default=8)
    options = parser.parse_args()
    profile, shape = read_profile(f"{options.profile}/profile.csv"), read_shape(options.model)
    pairs = []
    for seed in range(options.repeats):
        pairs += held_out(profile, shape, options.held_out, seed)
    note = profile.note
    print(f"{note.get('processor')}, {note.get('cores')} cores, {profile.setup.dtype}, {note.get('date')}")
    print(format_errors(pairs))
    for phase in ("prefill", "decode"):
        print(f"{phase}: " + verdict([pair for pair in pairs if pair.phase == phase], "held-out points"))


def held_out(profile, shape, share: float, seed: int) -> list[TimePair]:
    """Predictions of a random share of the layers' points by a fit to all others."""
    layers = [entry for entry in profile.measured() if entry.point.part == "layer"]
    generator = random.Random(seed)
    drawn = {entry.point for entry in layers if not _corner(entry, layers) and generator.random() < share}
    model = fit_profile(profile, shape, keep=lambda entry: entry.point not in drawn)
    unit = unit_roofline(shape, profile.setup)
    pairs = []
    for entry in layers:
        point = entry.point
        fit = model.get(point.device_type, "layer", point.phase, point.bits)
        if point not in drawn or fit is None:
            continue
        values = columns(unit, "layer", point.phase, point.bits, point.batch, point.length_tokens)
        predicted = sum(weight * value for weight, value in zip(fit.weights, values, strict=True))
        pairs.append(TimePair(point.device_type, point.phase, str(point.bits), predicted, entry.seconds))
    return pairs


def _corner(entry, layers) -> bool:
    alike = [other.point for other in layers if other.point.phase == entry.point.phase]
    batches, lengths = {point.batch for point in alike}, {point.length_tokens for point in alike}
    point = entry.point
    return point.batch in (min(batches), max(batches)) and point.length_tokens in (min(lengths), max(lengths))


if __name__ == "__main__":
    main()
