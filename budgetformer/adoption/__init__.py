"""Take over a classifier that somebody else trained."""
