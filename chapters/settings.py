"""
Settings to try: options of train.py, typed with several values, go in; out come settings, one value
of each. chapters.search trains with them.

    from chapters.settings import sample_settings
    sample_settings({"learning_rate": (1e-3, 1e-1), "n_layer": [2, 4, 6]}, n=9, seed=0)
"""

import itertools
import math
import shlex
from dataclasses import field, fields, make_dataclass
from random import Random

from data import TokenLoader
from model import GPTConfig
from sample import pick_device
from tokenizer import field_kind
from train import TrainConfig, check_memory, check_model, complete_options, split_batch

OWN = {"out", "max_steps", "seed", "resume", "rewarm", "epochs", "tokens", "minutes", "eval_every"}
ONE = {"data", "config", "vocab_size", "device", "precision"}  # a path may have commas of its own


# -----------------------------------------------------------------------------
# What is typed.


class Values(str):
    """The values of an option as they are typed: a range A..B, choices A,B,C, or one."""


def searchable(config_class):
    """A dataclass of the same options, but each that can be searched takes Values."""
    columns = []
    for f in fields(config_class):
        kind = field_kind(f) if f.name in ONE or field_kind(f) is bool else Values
        if f.name not in OWN:
            columns.append((f.name, kind, field(default=f.default, metadata=f.metadata)))
    return make_dataclass(config_class.__name__, columns,
                          namespace=dict(__doc__=config_class.__doc__))


def parse_values(name, kind, text):
    """"1e-3..1e-1" -> (0.001, 0.1), a range; "2,4,6" -> [2, 4, 6], choices; "2" -> [2]."""
    low, dots, high = text.partition("..")
    try:
        if not dots:
            return [kind(word) for word in text.split(",")]
        low, high = kind(low), kind(high)
    except ValueError:
        raise ValueError(f"--{name}={text} is no {kind.__name__}, no range A..B and no list A,B,C "
                         "of such") from None
    if kind is str:
        raise ValueError(f"--{name}={text}: words have no range, list them: A,B,C")
    if not 0 <= low < high < math.inf:
        raise ValueError(f"--{name}={text}: a range goes from a number that is not negative up to "
                         "a higher one")
    return low, high


def all_values(options):
    """{name: what was typed} -> {name: a range (low, high) or a list of its values}."""
    kinds = {f.name: field_kind(f) for f in (*fields(TrainConfig), *fields(GPTConfig))}
    return {name: parse_values(name, kinds[name], value) if isinstance(value, Values) else [value]
            for name, value in options.items()}


def as_typed(options):
    """Options as they are typed: {"n_layer": 2, "bias": False} -> "--n_layer=2 --no-bias"."""
    words = []
    for name, value in options.items():
        words += ([f"--{name}", *value] if isinstance(value, list) else
                  [f"--{name}={value}"] if not isinstance(value, bool) else
                  [f"--{'' if value else 'no-'}{name}"])
    return shlex.join(words)


def complete_config(options):
    """{name: value} of train.py's options -> (TrainConfig, GPTConfig); ValueError if they cannot
    be trained with."""
    of_class = [{f.name: options[f.name] for f in fields(config_class) if f.name in options}
                for config_class in (TrainConfig, GPTConfig)]
    config, shape = complete_options(*of_class)
    check_model(shape, config)
    split_batch(config, 1)
    return config, shape


# -----------------------------------------------------------------------------
# What is tried.


def spread(space, n, random):
    """n values: choices in turn, or one from each of n equal parts of a range on a log scale, so
    that few runs leave no gap."""
    if isinstance(space, list):
        return [space[i % len(space)] for i in range(n)]
    low, high = space
    shares = [(i + random.random()) / n for i in range(n)]
    values = [low * (high / low) ** share if low else high * share for share in shares]
    return [round(x) if isinstance(low, int) else float(f"{x:.3g}") for x in values]


def sample_settings(spaces, n, seed):
    """-> at most n different settings, dicts; of choices alone no more than there are."""
    random = Random(seed)
    if all(isinstance(space, list) for space in spaces.values()):
        grid = list(itertools.product(*map(dict.fromkeys, spaces.values())))
        rows = random.sample(grid, min(n, len(grid)))
    else:
        columns = [spread(space, n, random) for space in spaces.values()]
        rows = dict.fromkeys(zip(*(random.sample(column, n) for column in columns)))
    return [dict(zip(spaces, values)) for values in rows]


def check_settings(settings, fixed, shards=None):
    """-> the TrainConfig of the last of these settings; ValueError that names one which cannot be
    trained with, or not on the shards, once there are some."""
    for setting in settings:
        try:
            config, shape = complete_config(fixed | setting)
            if shards:
                micro, _ = split_batch(config, 1)
                check_memory(shape, config, micro, pick_device(config.device))
                for split in "train", "val":
                    TokenLoader(shards, 1, shape.block_size, split=split)
        except ValueError as error:
            raise ValueError(f"{as_typed(setting)}: {error}" if setting else error) from None
    return config
