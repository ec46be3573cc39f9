"""The HTTP server of a frontend, with one module per family of routes."""
