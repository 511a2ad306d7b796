"""Errors of setting up and running a host, each with a message for the person who runs the script."""


class HostError(Exception):
    """A failure of the host; the message gives the cause and the remedy."""


class SetupError(HostError):
    """The environment or the host could not be set up."""


class StartError(HostError):
    """The host did not start, or ended while it was needed."""
