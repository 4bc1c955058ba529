"""A read-only HTTP service over one store, and the page that explores it in a browser."""
