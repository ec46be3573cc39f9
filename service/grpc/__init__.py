"""KServe v2 over gRPC, beside HTTP: it may import `service.http`, which knows nothing of it."""
