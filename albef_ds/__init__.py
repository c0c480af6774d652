"""albef_ds: training ALBEF (Align before Fuse) fast, with the reference's numbers.

albef_ds.load("RUN or FILE.pth")      # a trained model, ready to use: albef_ds/inference
"""

__version__ = "0.1.0"


def __getattr__(name: str):
    # Only when asked for: the launcher and the loader's workers import this package too, and need no model.
    if name == "load":
        from albef_ds.inference.loading import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
