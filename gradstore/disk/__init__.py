"""How bytes stay whole: files, checksums, plans, units, commits, the lock."""
