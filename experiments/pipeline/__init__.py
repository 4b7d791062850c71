"""The stages of a run: what each depends on, what it does, and where its result lies."""
