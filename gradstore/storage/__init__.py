"""Files that stay whole: atomic writes, checked reads, the lock."""
