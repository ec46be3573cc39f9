"""Scheduling as pure logic: time is a parameter, and there is no I/O, no torch and no HTTP."""
