"""Muse (arXiv 2301.00704) on top of MaskGIT (2202.04200), and aMUSEd."""
