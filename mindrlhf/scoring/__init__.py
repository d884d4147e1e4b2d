"""Scoring: plan, scorer, evaluation, inference."""
