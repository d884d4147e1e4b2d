"""Preference data: from rows of text to batches."""
