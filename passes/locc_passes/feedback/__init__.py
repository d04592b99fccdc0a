"""Feedback alignment: errors go back through fixed random matrices."""
