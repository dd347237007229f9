"""What goes wrong for reasons that lie with the user."""


class InputError(Exception):
    """Something the user can mend; the message says how."""
