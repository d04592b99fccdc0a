"""Target propagation."""
