"""What panther raises when it is not a plain wrong argument (those are ValueError and TypeError)."""


class PantherError(Exception):
    """The parent of every error of panther's own; its text says what to do next."""


class CaptureError(PantherError):
    """The model could not be run on the example inputs at all."""


class CalibrationError(PantherError):
    """The calibration data cannot be used: no batches, wrong shapes, or values that are not finite."""


class PlanError(PantherError):
    """A plan does not belong to this model, or cannot be read."""


class TunerError(PantherError):
    """A search has no result: every trial failed, or the constraints leave nothing to try."""


class ExhaustedError(TunerError):
    """Every allowed point of the box was tried."""


class NothingAllowedError(TunerError):
    """No point of the box was found that fulfils the constraints."""


class JournalError(TunerError):
    """A journal of trials cannot be used: it is of another study, damaged, or in use."""


class LoadError(PantherError):
    """A file could not be read, or reading it would not be safe."""


class ExportError(PantherError):
    """The exported file is wrong or could not be written."""


def one_line(error: BaseException) -> str:
    """What went wrong in somebody else's code, as part of a sentence: the error's type and first line."""
    lines = str(error).strip().splitlines() or ["no message"]
    return f"{type(error).__name__}: {lines[0][:200]}"
