"""Fault injection: cause every fault that a server must survive, and count what clients see."""
