"""
What is learned of chats, in colour: what the assistant says and the end of it, and nothing else.

    python -m chapters.chats chats.jsonl
    python -m chapters.chats chats.jsonl --tokenizer=runs/a/tokenizer.json --block_size=256

A row is {"messages": [{"role", "content"}, ...]}, {"instruction", "input", "output"}, or {"text",
"label"}; python data.py chats.jsonl makes shards of such rows, and train.py learns from them.
"""

import os
import sys
from itertools import groupby
from pathlib import Path

if __name__ == "__main__":  # `python chapters/chats.py` works as well, from any folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from data import load_tokenizer, read_chats
from tokenizer import Parser, Tokenizer, run_command

LEARNED, READ, PLAIN = "\x1b[42;30m", "\x1b[2m", "\x1b[0m"  # green, dim, as before


def shown(ids, learned, tokenizer, colour=True):
    """A chat as text in which the tokens that are learned stand out: green, or in [[...]]."""
    parts, begin, end = [], *((LEARNED, PLAIN) if colour else ("[[", "]]"))
    for is_learned, group in groupby(zip(ids, learned), lambda pair: bool(pair[1])):
        text = tokenizer.decode([int(id) for id, _ in group])
        parts.append(f"{begin}{text}{end}" if is_learned else
                     f"{READ}{text}{PLAIN}" if colour else text)
    return "".join(parts)


def main():
    parser = Parser(__doc__)
    parser.add_argument("file", help=".jsonl or .json of chats")
    parser.add_argument("--tokenizer", help="tokenizer.json; else one that knows bytes alone")
    parser.add_argument("--block_size", type=int, default=512, help="tokens; default %(default)s")
    parser.add_argument("--n_chats", type=int, default=3, help="to show; default %(default)s")
    args = parser.parse_intermixed_args()
    skipped = []
    tokenizer = load_tokenizer(args.tokenizer) if args.tokenizer else Tokenizer([])
    chats = [tokenizer.render_chat(chat) for chat in read_chats(args.file, skipped.append)]
    if not chats:
        raise ValueError("; ".join(skipped[:1]) or f"{args.file}: no chat is in it")
    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    for ids, mask in chats[:max(0, args.n_chats)]:
        print(shown(ids, mask, tokenizer, colour), end="\n\n")
    n_tokens = sum(len(ids) for ids, _ in chats)
    n_learned = sum(sum(mask) for _, mask in chats)
    n_long = sum(len(ids) > args.block_size + 1 for ids, _ in chats)
    print(f"{len(chats):,} chats of {n_tokens:,} tokens, {n_learned / n_tokens:.0%} of them "
          f"learned; {n_long:,} longer than {args.block_size}; {len(skipped):,} broken rows")
    for line in skipped[:3]:
        print(f"skipped: {line}")


if __name__ == "__main__":
    run_command(main)
