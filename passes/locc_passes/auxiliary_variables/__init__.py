"""Auxiliary variables: activations become variables of their own."""
