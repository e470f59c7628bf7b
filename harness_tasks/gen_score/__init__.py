"""The Gen Score as a metric of `evaluate`; it loads this folder, not this package."""
