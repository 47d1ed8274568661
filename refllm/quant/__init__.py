"""Which code each value gets: calibration, rounding, transforms, and whole models."""
