"""What several papers use: draws, text encoders, checkpoints, the generator base class."""
