"""Sets up, starts, drives and stops a real ComfyUI, to try and test this pack.

`setup` makes the environment (`venv`) and gets the host (`source`); `server` runs it (`process`); `client` talks to it,
with prompts that `workflow` makes from workflow files. Everything up to `server` needs nothing but Python itself.
"""

import sys

# This must stay readable for any Python 3, so that an old one gets this sentence and no SyntaxError further on.
if sys.version_info < (3, 10):  # noqa: UP036
    sys.exit(
        f"This needs Python 3.10 or newer, and {sys.executable} is Python {sys.version_info[0]}.{sys.version_info[1]}. "
        "Run the same command with a newer one, such as python3.11."
    )
