"""Searches for the best parameters of any function: sizes, learning rates, sketches."""
