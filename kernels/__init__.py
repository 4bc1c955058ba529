"""Not a package to import: the code is `gradkernels`, one level down (docs/adr/0002)."""

__version__ = "0.0.0"
