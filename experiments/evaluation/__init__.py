"""Evaluations: scores of pictures, whatever made them, and what a result says of itself."""
