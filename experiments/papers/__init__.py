"""One file per paper: its settings, its presets, its checks and its stages."""
