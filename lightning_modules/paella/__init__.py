"""Paella: text-conditional renoising of image tokens (arXiv 2211.07292)."""
