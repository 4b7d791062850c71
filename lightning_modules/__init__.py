"""The papers, one folder each, and what several of them use."""
