"""Break a server under load in every way that it promises to stand, and count what callers saw."""
