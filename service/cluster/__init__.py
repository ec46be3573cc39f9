"""The same server on a Ray cluster: frontends, engines and the hub are deployments of Ray Serve.

`service.cluster.application:application` is what a Serve config file imports.
"""

RAY = {
    "RAY_worker_niceness": "0",
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    "RAY_SERVE_HAPROXY_RETRY_ON": "conn-failure empty-response",
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "5",
}
"""Environment of Ray's processes, on every host before they start.

They are the server, and by default get what others leave. HAProxy takes requests straight to the
frontends, and asks another frontend if one dies before it answers; calls between replicas go by
gRPC and cross no thread; a frontend that ends is given five seconds to be forgotten.
"""
