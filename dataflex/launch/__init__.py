"""Launching a run: checks, inputs, the session, and the processes that train."""
