"""The server on a Ray cluster: frontends, engines and the hub are deployments of Ray Serve.

A Serve config file imports `service.cluster.application:application`.
"""

RAY = {
    "RAY_worker_niceness": "0",
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    "RAY_SERVE_HAPROXY_RETRY_ON": "conn-failure empty-response",
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "5",
}
"""Environment that Ray's processes need on every host before they start.

By default Ray lowers the priority of its workers, which are the server here. HAProxy sends requests
directly to the frontends, and retries on another frontend if one dies before it answers. Calls
between replicas use gRPC without switching threads. A frontend that ends keeps serving for five
seconds, until HAProxy no longer uses it.
"""
