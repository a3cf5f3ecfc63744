"""The error of an answer that cannot be translated."""


class Unreadable(ValueError):
    """A backend's answer is an error, or cannot be read without doubt; the message says why, in the backend's words if it
    reported an error."""
