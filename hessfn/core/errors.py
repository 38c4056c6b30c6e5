"""Every error that the library raises by itself: one class, and for each kind the built-in one that it also is."""


class HessfnError(Exception):
    """What all errors of hessfn are, so that ``except HessfnError`` catches these and nothing else."""


class InvalidInput(HessfnError, ValueError):
    """An argument is out of range or of another kind, or what it leads to is not finite; the message has the remedy."""


class Untraceable(HessfnError, RuntimeError):
    """A graph of this loss would not be this loss; the message says why. Its products can still be had untraced."""


class NoDerivative(HessfnError, NotImplementedError):
    """A second derivative cannot be had, in this mode or in any; the message says what stands in the way."""


class RankError(HessfnError, RuntimeError):
    """A process of the group failed, died, came too late, or none was started."""


class JournalError(HessfnError, ValueError):
    """What is on the disk is damaged, or of something else."""


class FolderInUse(HessfnError, BlockingIOError):
    """Another process works in this folder."""


class CannotWrite(HessfnError, OSError):
    """A file cannot be written, as on a full disk; files already there are good."""


class NotThere(HessfnError, FileNotFoundError):
    """A file is not there, and cannot be fetched."""


class MissingExtra(HessfnError, ModuleNotFoundError):
    """A package that only this function needs is not installed; the message has the command that installs it."""


class WrongProduct(HessfnError, RuntimeError):
    """A compiled product is not that of the uncompiled operations."""


class OutOfMemory(HessfnError, MemoryError):
    """A kernel found no memory for its work."""
