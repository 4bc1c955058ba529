"""An HTTP service over one store, which takes writes where asked to, and the page that explores it."""
