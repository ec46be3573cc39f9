"""Time the compact pass and its baselines, interleaved, and report ratios."""
