"""The store on disk: reading, writing, verifying and cleaning generations."""
