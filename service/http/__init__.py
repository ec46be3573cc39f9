"""HTTP: one module per family of routes."""
