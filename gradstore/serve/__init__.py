"""An HTTP service over one store, which may take writes, and the page that explores it."""
