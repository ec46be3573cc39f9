"""The engine: a process that owns a device, its queue and its models."""
