"""
Programs that a model wrote, run in a box, and the share of those that pass their tests (HumanEval,
arXiv:2107.03374).

    python -m chapters.box program.py            # does it come to its end without an error?

The box stops accidents: endless loops, memory and disks filled, files removed, calls over the
network. It does not stop code that means harm: the limits are the system's for one user, the rest
is Python asked from within Python, files can be read, and on Windows only time is limited. For code
you do not trust, use a virtual machine without network.
"""

import math
import os
import secrets
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":  # `python chapters/box.py` works as well, from any folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from tqdm import tqdm

from chapters.probes import answers
from model import check_options, option
from tokenizer import QUIET, parse_options, reading, run_command

STOP = ["\nclass", "\ndef", "\n#", "\nif", "\nprint"]  # what begins behind the end of a function

BOX = """
import sys
try:
    import ctypes, resource
    for name, most in ("CPU", {seconds}), ("AS", 1 << 30), ("FSIZE", 1 << 20), ("NPROC", 0):
        resource.setrlimit(getattr(resource, "RLIMIT_" + name), (most, most))
    if sys.platform == "linux":
        ctypes.CDLL(None).unshare(0x50000000)  # a new user with a network of its own: an empty one
except (ImportError, ValueError, OSError, AttributeError):
    pass

def refuse(event, args):
    area, _, what = event.partition(".")
    writes = event == "open" and (args[2] or 0) & 0x643  # for writing or appending, or a new file
    if writes or what not in ("listdir", "scandir") and area in (
            "os", "socket", "subprocess", "shutil", "ctypes", "pty", "signal", "winreg", "_winapi"):
        raise PermissionError(event + " is not allowed here")

sys.addaudithook(refuse)
"""


def run_program(program, seconds=5):
    """Whether a Python program comes to its end without an error, in a process of its own: in an
    empty folder, without the environment, packages, network and new processes, with limits on time,
    memory (1 GB) and what it writes (1 MB a file)."""
    mark = secrets.token_hex(16)  # so that a program that stops early has not passed
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "program.py")
        path.write_text(f"{BOX.format(seconds=seconds)}\n{program}\nprint({mark!r})\n", "utf-8")
        environment = {name: os.environ[name] for name in ("SYSTEMROOT",) if name in os.environ}
        with open(Path(folder, "shown.txt"), "w+b") as shown:  # a pipe would fill our memory
            try:
                done = subprocess.run([sys.executable, "-I", "-S", str(path)], cwd=folder,
                                      env=environment, stdin=subprocess.DEVNULL, stdout=shown,
                                      stderr=subprocess.DEVNULL, timeout=2 * seconds)
            except subprocess.TimeoutExpired:
                return False
            shown.seek(max(0, shown.seek(0, 2) - 100))
            return done.returncode == 0 and shown.read().split()[-1:] == [mark.encode()]


def pass_at_k(n, n_right, k):
    """The chance that of k samples, taken from n of which n_right are right, one is right:
    pass_at_k(4, 1, 2) == 0.5. arXiv:2107.03374"""
    return 1 - math.comb(n - n_right, k) / math.comb(n, k)


def score_programs(model, tokenizer, questions, config):
    """Whether the function that the model writes after a question passes its tests."""
    n, counts, temperature = config.n_samples, [], 0.8 if config.n_samples > 1 else 0
    samples = [list(answers(model, tokenizer, questions, STOP, seed=config.seed + i,
                            temperature=temperature)) for i in range(n)]
    for question, *texts in zip(tqdm(questions, "running code", **QUIET),
                                *samples):
        right = sum(run_program(f"{question['context']}{text}\n{question['check']}")
                    for text in texts)
        counts.append({f"pass@{k}": [pass_at_k(n, right, k), 1] for k in (1, 10) if k <= n}
                      | {"shown": texts})
    return counts, {}


@dataclass(frozen=True)
class Command:
    """What is run."""
    path: str = option("program.py", "a Python program", positional=True)
    seconds: int = option(5, "of computing that it may take", low=1, below=3601)

    def __post_init__(self):
        check_options(self)


def main():
    command = Command(**parse_options(__doc__, Command)[0])
    with reading(command.path):
        program = Path(command.path).read_text("utf-8-sig")
    passed = run_program(program, command.seconds)
    print(f"{command.path} {'came to its end' if passed else 'failed, or was stopped'}")


if __name__ == "__main__":
    run_command(main)
