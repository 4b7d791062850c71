"""The commands: commands that a person types, and the configs these read."""
