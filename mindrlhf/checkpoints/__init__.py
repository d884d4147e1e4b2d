"""Checkpoints: find, load, shards over ranks, save."""
