"""albef_ds: training ALBEF (Align before Fuse) fast, with the reference's numbers."""

__version__ = "0.1.0"
