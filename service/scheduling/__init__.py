"""Scheduling: pure logic with a clock passed in. No I/O, no torch, nothing of HTTP."""
