"""What goes wrong for reasons that lie with the user."""


class InputError(Exception):
    """Something the user can mend; the message says how."""


class MissingPackage(InputError, ImportError):
    """An optional package that is not installed; the message says which, and how to get it."""


class UnevenBatchError(ValueError):
    """A noise layer was given a batch that the draws of a pass do not divide."""
