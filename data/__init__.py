"""Captioned image shards and the DataModule that reads them."""
