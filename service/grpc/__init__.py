"""KServe v2 over gRPC. This package imports `service.http`, never the other way round."""
