"""Scores of training rows from stored features, and the choice of rows by score."""
