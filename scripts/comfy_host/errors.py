"""What can go wrong with a host, each with a message for the person who runs the script."""


class HostError(Exception):
    """Something about the host failed; the message says what, and what helps."""


class SetupError(HostError):
    """The environment or the host could not be made ready."""


class StartError(HostError):
    """The host did not start, or ended while it was needed."""
