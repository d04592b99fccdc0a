"""Synthetic gradients."""
