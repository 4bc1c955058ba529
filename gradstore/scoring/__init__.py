"""The streamed passes behind influence scores and the index."""
