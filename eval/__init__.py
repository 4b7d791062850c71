"""Scores, each under the name it has earned."""
