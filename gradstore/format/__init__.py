"""The format of a store: names, documents and codecs, without any file access."""
