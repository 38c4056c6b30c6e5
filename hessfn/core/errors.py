"""Every error that the library raises by itself: one class, and for each kind the built-in one that it also is."""


class HessfnError(Exception):
    """The base class of all errors of hessfn: ``except HessfnError`` catches these and nothing else."""


class InvalidInput(HessfnError, ValueError):
    """An argument is out of range or of another kind, or what it leads to is not finite; the message has the remedy."""


class Untraceable(HessfnError, RuntimeError):
    """The loss cannot be traced to one graph; the message says why. :func:`hessfn.hvp` still makes its products."""


class NoDerivative(HessfnError, NotImplementedError):
    """There is no second derivative, in this mode or in any; the message says why."""


class RankError(HessfnError, RuntimeError):
    """A process of the group failed, died, came too late, or none was started."""


class JournalError(HessfnError, ValueError):
    """A journal on disk is damaged, or belongs to another matrix."""


class FolderInUse(HessfnError, BlockingIOError):
    """Another process works in this folder."""


class CannotWrite(HessfnError, OSError):
    """A file cannot be written, as on a full disk; files already there are good."""


class NotThere(HessfnError, FileNotFoundError):
    """A file does not exist, and cannot be downloaded."""


class MissingExtra(HessfnError, ModuleNotFoundError):
    """A package that only this function needs is not installed; the message has the command that installs it."""


class WrongProduct(HessfnError, RuntimeError):
    """A compiled product differs from that of the uncompiled operations."""


class OutOfMemory(HessfnError, MemoryError):
    """A kernel found no memory for its work."""
