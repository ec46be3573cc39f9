"""Checkpoints: what they hold, and how they are stored, loaded and installed."""
