"""The baseline: end-to-end backpropagation."""
