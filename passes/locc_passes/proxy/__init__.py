"""Proxy objectives: each module trains on a loss of its own."""
