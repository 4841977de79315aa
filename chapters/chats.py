"""
Chats to batches: only what the assistant says is learned, and many chats share a block without
seeing each other.

    python -m chapters.chats chats.jsonl                       # which tokens are learned, in colour
    python -m chapters.chats chats.jsonl --tokenizer=runs/a/tokenizer.json --block_size=256

A row is {"messages": [{"role", "content"}, ...]}, or {"instruction", "input", "output"}.
"""

import os
import sys
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

if __name__ == "__main__":  # `python chapters/chats.py` works as well, from any folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np

from data import load_tokenizer, read_rows
from tokenizer import Parser, Tokenizer, reading, run_command

LEARNED, READ, PLAIN = "\x1b[42;30m", "\x1b[2m", "\x1b[0m"  # green, dim, as before


def take_chat(row):
    """The messages of a row; ValueError if it has none."""
    row = row if isinstance(row, dict) else {}
    if isinstance(row.get("messages"), list):
        return row["messages"]
    parts, answer = [row.get("instruction"), row.get("input", "")], row.get("output")
    if not all(isinstance(part, str) for part in [*parts, answer]):
        raise ValueError("neither messages, a list, nor instruction and output, which are texts")
    return [dict(role="user", content="\n\n".join(filter(None, parts))),
            dict(role="assistant", content=answer)]


def read_chats(path, skip=None, check=lambda messages: None):
    """Yield the messages of each row of a .jsonl or .json file; skip(reason) as in read_rows, also
    of messages for which check(messages) is a ValueError."""
    def take(row):
        check(messages := take_chat(row))
        return messages
    return read_rows(path, take, skip=skip)


def fit(messages, tokenizer, block_size):
    """The ids and the loss mask of a chat, without the last turns if it is longer than block_size
    + 1 tokens, so that the whole of each turn is kept or none; None if not even the first fits."""
    while messages:
        ids, learned = tokenizer.render_chat(messages)
        if len(ids) <= block_size + 1:
            return np.array(ids), np.array(learned)
        ends = [i for i, message in enumerate(messages[:-1]) if message["role"] == "assistant"]
        messages = messages[:ends[-1] + 1] if ends else []


def pack(lengths, block_size):
    """Which items go to which block, the longest first, each to the first block with room:
    pack([2, 3, 1], 4) == [[1, 2], [0]]."""
    blocks, room = [], np.zeros(len(lengths), int)
    for i in np.argsort(-np.asarray(lengths, int), kind="stable").tolist():
        at = int((room[:len(blocks)] >= lengths[i]).argmax()) if blocks else 0
        if at == len(blocks) or room[at] < lengths[i]:
            at = len(blocks)
            blocks.append([])
            room[at] = block_size
        blocks[at].append(i)
        room[at] -= lengths[i]
    return blocks


class ChatLoader(Iterator):
    """Endless batches (x, y, segments), int64 (batch_size, block_size), of chats, lists of
    messages. y is x one token on where that is learned, and -1 elsewhere; segments numbers the
    chats of a block from 1, for the model's attention, and is 0 where a block is padded. A batch
    depends on (seed, position, rank, world_size) alone, as with TokenLoader. left_out counts the
    chats whose first turn is too long. ValueError where none fits, or a message is wrong."""

    def __init__(self, chats, tokenizer, batch_size, block_size, rank=0, world_size=1, seed=0,
                 position=0):
        rendered = []
        for number, messages in enumerate(chats, 1):
            with reading(f"chat {number}"):
                rendered.append(fit(messages, tokenizer, block_size))
        self.chats = [chat for chat in rendered if chat]
        self.left_out = len(rendered) - len(self.chats)
        if not self.chats:
            raise ValueError(f"none of {len(rendered)} chats fits into {block_size} tokens: give "
                             "shorter ones, or a larger block_size")
        self.blocks = pack([len(ids) - 1 for ids, _ in self.chats], block_size)
        self.n_blocks, self.padding = len(self.blocks), tokenizer.eot
        self.batch_size, self.block_size, self.seed = batch_size, block_size, seed
        self.rank, self.world_size, self.position = rank, world_size, position

    def __next__(self):
        first = (self.position * self.world_size + self.rank) * self.batch_size
        rows = [self.block(first + i) for i in range(self.batch_size)]
        self.position += 1
        return tuple(np.stack(rows, axis=1))                                    # 3 times (B, T)

    def block(self, number):
        """x, y and segments of a block of the endless stream, (3, T)."""
        epoch, i = divmod(number, self.n_blocks)
        order = np.random.RandomState([self.seed, epoch]).permutation(self.n_blocks)
        x, y, segments = block = np.array([[self.padding], [-1], [0]]).repeat(self.block_size, 1)
        start = 0
        for segment, chat in enumerate(self.blocks[order[i]], 1):
            ids, learned = self.chats[chat]
            own = slice(start, start := start + len(ids) - 1)
            x[own], y[own] = ids[:-1], np.where(learned[1:], ids[1:], -1)
            segments[own] = segment
        return block


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
    chats = [*read_chats(args.file, skipped.append, tokenizer.render_chat)]
    if not chats:
        raise ValueError("; ".join(skipped[:1]) or f"{args.file}: no chat is in it")
    loader = ChatLoader(chats, tokenizer, 1, args.block_size)
    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    for ids, learned in loader.chats[:max(0, args.n_chats)]:
        print(shown(ids, learned, tokenizer, colour), end="\n\n")
    n_learned = sum(int(learned.sum()) for _, learned in loader.chats)
    n_tokens = sum(len(ids) for ids, _ in loader.chats)
    print(f"{len(loader.chats):,} chats of {n_tokens:,} tokens, {n_learned / n_tokens:.0%} of them "
          f"learned, in {loader.n_blocks:,} blocks of {args.block_size}; left out: "
          f"{loader.left_out:,} too long, {len(skipped):,} broken rows")
    for line in skipped[:3]:
        print(f"skipped: {line}")


if __name__ == "__main__":
    run_command(main)
