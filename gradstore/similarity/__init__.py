"""Similarity of rows: index, neighbours, clusters and coresets."""
