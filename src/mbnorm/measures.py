"""The constants of what a Matched layer measures; the C++ kernels repeat them."""

MEASURED_WEIGHT = 0.02
"""Weight of a batch in what is measured of the batches."""

EARLY = 8.0
"""After t batches the next has at least the weight 8 / (t + 8), so that the first ones are forgotten."""

SEEDED = 400.0
"""How many samples a trained norm's statistics stand for: from so many on `MEASURED_WEIGHT` is the larger."""

MEASURES = 4
"""Numbers that are kept of what has been measured."""
