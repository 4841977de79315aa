"""What belongs to the course, and is run by python -m chapters.NAME from the folder above."""

import signal
import sys

# While Python looks for the module of -m, this is its name: a command is being started.
if sys.argv[0] == "-m" and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports: no traceback
