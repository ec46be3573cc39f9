"""Time the compact pass beside what a user would run instead, interleaved, as ratios."""
