"""Reports on a finished run."""
