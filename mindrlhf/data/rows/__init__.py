"""Rows of files, whatever kind of file they are in."""
