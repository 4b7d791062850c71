"""Improved VQ-Diffusion: guidance and purity sampling on top of it (arXiv 2205.16007)."""
