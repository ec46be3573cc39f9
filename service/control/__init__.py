"""The supervisor and the hub.

The supervisor starts and replaces the server's processes. The hub runs in the same process: it owns
the metrics, decides which models are served, and has the engines load them.
"""
