"""What the demo tells the person who typed the command, instead of a traceback."""


class DemoError(Exception):
    """A request that cannot be served; the message says what came and what to do."""
