"""The hub: what the supervisor's process knows for all others.

It owns the metrics, says which models are served, and has the engines load them.
"""
