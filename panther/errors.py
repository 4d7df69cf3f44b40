"""What panther raises when it is not a plain wrong argument (those are ValueError and TypeError)."""


class PantherError(Exception):
    """The parent of every error of panther's own; its text says what to do next."""


class CaptureError(PantherError):
    """The model could not be run on the example inputs at all."""


class CalibrationError(PantherError):
    """The calibration data cannot be used: no batches, wrong shapes, or values that are not finite."""


class PlanError(PantherError):
    """A plan does not belong to this model, or cannot be read."""


class LoadError(PantherError):
    """A file could not be read, or reading it would not be safe."""


class ExportError(PantherError):
    """The exported file is wrong or could not be written."""
