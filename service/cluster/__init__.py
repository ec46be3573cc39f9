"""The same server on a Ray cluster: fronts, engines and the hub are deployments of Ray Serve.

`service.cluster.application:application` is what a Serve config file imports.
"""
