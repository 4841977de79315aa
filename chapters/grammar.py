"""
Stories and worked arithmetic, made from tables of sentences and words.

A plot is a list of lines, a line a list of sentences to choose from; any choice makes a story.
{He}, {he}, {his} and {him} stand for the hero; {a_thing} is {thing} with "a" or "an". Each field of
a plot is in every sentence of at least one of its lines: so other words always make another story.
"""

import operator
import re
from itertools import permutations
from math import prod
from random import Random

PRONOUNS = {"she": dict(He="She", he="she", his="her", him="her"),
            "he": dict(He="He", he="he", his="his", him="him")}
PEOPLE = dict.fromkeys("Anna Clara Eva Greta Ida Julia Lena Mira Nora Rosa Sofia Wanda".split(),
                       "she") | dict.fromkeys(
    "Adam Boris David Emil Felix Hugo Jonas Leo Max Oskar Peter Tom".split(), "he")
FIELDS = dict(
    time=["day", "morning", "afternoon", "evening"],
    place=["the park", "the river", "the old mill", "the market", "the beach", "the school",
           "the garden", "the station", "the lake", "the farm", "the library", "the harbor"],
    thing=["red ball", "old map", "tin whistle", "blue cap", "toy boat", "wooden horse", "kite",
           "small lamp", "green scarf", "umbrella", "paper star", "orange bag"],
    animal="dog cat hedgehog duck rabbit squirrel goat owl pony crow".split(),
    food="bread apples soup pancakes cheese plums rice cookies nuts grapes".split(),
    items="apples stamps marbles pencils shells books coins cards".split())
PLOTS = [
    [  # lost and found
        ["One {time}, {hero} took {a_thing} to {place}.",
         "{hero} went to {place} one {time} and took {a_thing} along."],
        ["There {he} saw {a_animal}, and {he} was so glad that {he} forgot the {thing}.",
         "There {he} ran after {a_animal}, so {he} did not see that the {thing} stayed behind."],
        ["At home {he} looked for it everywhere, but it was gone.",
         "When {he} came home, {he} did not have it any more, and {he} cried."],
        ["{friend} had found it on the way and brought it back.",
         "Then there was a knock at the door: {friend} had found it."],
        ["Because {friend} had been so kind, {hero} gave {friend} some {food}.",
         "{hero} was so thankful that {he} shared {his} {food} with {friend}."],
        ["From that {time} on, {he} took better care of {his} things.",
         "Now {hero} looks around twice before {he} goes home."]],
    [  # rain
        ["{hero} and {friend} wanted to walk to {place}.",
         "{hero} had promised {friend} that they would go to {place}."],
        ["But that {time} it began to rain, and the path turned into mud.",
         "But dark clouds came up that {time}, and soon it rained hard."],
        ["They were wet and cold, so they hid under a roof, where {a_animal} was hiding, too.",
         "Because of the rain they waited in a barn, and {a_animal} waited beside them."],
        ["{hero} had {a_thing} in {his} bag, and they played with it to pass the time.",
         "{friend} was bored, so {hero} took out {a_thing} to play with."],
        ["When they were hungry, they ate the {food} that {friend} had brought.",
         "They had only some {food} to eat, and so each of them ate half."],
        ["At last the sun came out, and everything shone.",
         "Then the rain stopped, and they could go on.",
         "In the end it was the best walk that they had ever had."]],
    [  # a broken thing is mended
        ["{hero} had {a_thing} that {he} loved more than anything.",
         "For {his} birthday {hero} had got {a_thing}."],
        ["One {time}, {a_animal} ran through the room, and the {thing} fell down and broke.",
         "One {time}, {a_animal} played with the {thing}, and it broke."],
        ["{hero} was angry at first, but the {animal} looked sad, so {he} was not angry for long.",
         "{hero} wanted to shout, but the {animal} had meant no harm, and so {he} only sighed."],
        ["{friend} knew somebody at {place} who could mend such things.",
         "{friend} said that they should look for glue at {place}."],
        ["They went there, and after some hours the {thing} was whole again.",
         "It took a long time, but in the end the {thing} was as good as new."],
        ["To celebrate, they ate {food} together, and even the {animal} got some.",
         "Because {friend} had helped, {hero} put {food} on the table for both of them."]],
    [  # an animal is helped
        ["On the way to {place}, {hero} heard a small sound.",
         "{hero} was near {place} when something cried for help."],
        ["It was {a_animal} that was caught in a fence.",
         "It was {a_animal} with a thorn in its foot."],
        ["It was afraid, so {he} gave it some {food} until it was calm.",
         "It would not let {him} come near, so {he} held out some {food}."],
        ["Alone {he} could not help it, so {he} called {friend}, who came at once.",
         "{He} called {friend}, because for one person it was too hard."],
        ["They laid a coat over the {animal} and set it free.",
         "{friend} held the {animal} while {hero} set it free."],
        ["The next {time} it came to {his} door and brought {him} {a_thing}.",
         "The next {time} it followed {him} home, and it would sleep only beside {a_thing}."]],
    [  # a race that is won by the slower one
        ["{hero} could run faster than {friend}, and {he} said so every {time}.",
         "Every {time} {hero} told {friend} that nobody could run as fast as {he} could."],
        ["So they agreed on a race to {place}; the first one there would get {a_thing}.",
         "\"Then let us race to {place},\" said {friend}, \"and the winner gets {a_thing}.\""],
        ["{hero} was far ahead, so {he} sat down to eat some {food}, and {he} fell asleep.",
         "Soon {hero} was so far ahead that {he} stopped for some {food} and then took a nap."],
        ["When {a_animal} woke {him} up, {friend} had already passed.",
         "{He} slept until {a_animal} made a noise, but by then it was too late."],
        ["{friend} had walked all the way without a rest, and so {friend} won.",
         "{friend} was slow, but {friend} had never stopped, and that was enough to win."],
        ["Since then {hero} has not boasted any more.",
         "{hero} laughed and said that {he} had learned something."]],
    [  # a seed
        ["{friend} gave {hero} a seed that came from {place}.",
         "{hero} found a seed on the way to {place} and showed it to {friend}."],
        ["{hero} planted it in a pot beside {a_thing} and gave it water every {time}.",
         "Every {time}, {he} watered it and turned the pot, which stood beside {a_thing}."],
        ["But {a_animal} dug in the earth, so nothing grew.",
         "But {a_animal} sat down on the pot, and the first leaf broke."],
        ["{hero} put a small fence around it, because {he} did not want to give up.",
         "{friend} said that one must be patient, so {hero} tried once more."],
        ["In spring there was a green stem, and in summer a flower as high as {hero}.",
         "After some weeks it grew, because now it had sun, water and rest."],
        ["They sat down under it and ate {food}.",
         "Proud of it, {he} asked {friend} to come, and there was {food} for everyone."]],
]
# Questions, and the steps to the answer: {result: "x op y"}, which may use earlier results.
PROBLEMS = [
    ("{hero} has {a} {items}. {friend} gives {him} {b} more. Then {he} loses {c}. How many "
     "{items} does {hero} have now?", dict(d="a + b", e="d - c")),
    ("{hero} has {a} {items}, and {friend} has {b} more than {hero}. How many {items} do they have "
     "together?", dict(d="a + b", e="a + d")),
    ("There are {a} boxes with {b} {items} in each of them. {hero} takes out {c}. How many {items} "
     "are left in the boxes?", dict(d="a * b", e="d - c")),
    ("{hero} buys {a} {items} on Monday, {b} on Tuesday and {c} on Wednesday. How many {items} "
     "does {hero} buy in these three days?", dict(d="a + b", e="d + c")),
    ("{hero} has {a} {items} and {friend} has {b}. They put them together and make {c} equal "
     "heaps. How many {items} are in each heap?", dict(d="a + b", e="d / c")),
    ("A shop has {a} {items}. It sells {b} in the morning and {c} in the afternoon. How many "
     "{items} are left?", dict(d="b + c", e="a - d")),
]


# -----------------------------------------------------------------------------
# Stories: a number chooses a sentence for each line of a plot, and a word for each field.


def fields_of(plot):
    """The names of the FIELDS in the sentences of a plot."""
    names = {*re.findall(r"\{(?:a_)?(\w+)\}", " ".join(text for line in plot for text in line))}
    return [name for name in FIELDS if name in names]


def choices_of(plot):
    """The lists to choose from in a plot: pairs of people, words of each field, sentences of each
    line."""
    return [[*permutations(PEOPLE, 2)], *(FIELDS[name] for name in fields_of(plot)), *plot]


SIZES = [prod(map(len, choices_of(plot))) for plot in PLOTS]  # how many stories a plot makes
N_STORIES = len(PLOTS) * min(SIZES)  # different ones, as many of each plot


def story(plot, number):
    """The story of a plot with this number. Its digits, in mixed radix, are the choices."""
    picked = []
    for choices in choices_of(plot):
        number, i = divmod(number, len(choices))
        picked.append(choices[i])
    (hero, friend), *words = picked
    names = fields_of(plot)
    values = dict(zip(names, words), hero=hero, friend=friend, **PRONOUNS[PEOPLE[hero]])
    for name in names:
        values[f"a_{name}"] = ("an " if values[name][0] in "aeiou" else "a ") + values[name]
    return " ".join(words[len(names):]).format(**values)


def stories(n, seed=0):
    """n different stories, of all plots in turn; ValueError above N_STORIES. Small models can learn
    to write from stories in few words (arXiv:2305.07759)."""
    if n > N_STORIES:
        raise ValueError(f"n={n:,} is more than the {N_STORIES:,} stories that there are")
    n_each, random = -(-n // len(PLOTS)), Random(seed)  # rounded up
    numbers = [random.sample(range(size), n_each) for size in SIZES]
    return (story(PLOTS[i % len(PLOTS)], numbers[i % len(PLOTS)][i // len(PLOTS)])
            for i in range(n))


# -----------------------------------------------------------------------------
# Arithmetic: a question, its solution step by step, its answer.

OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.floordiv}


def columns(a, b, sign):
    """The steps of a + b, or of a - b for a >= b, as on paper, from the last digit on:
    columns(47, 38, "+") == ["7 + 8 = 15, carry 1", "4 + 3 + 1 = 8"]."""
    steps, carry, word = [], 0, {"+": ", carry 1", "-": ", borrow 1"}[sign]
    for i in range(len(str(max(a, b)))):
        x, y = a // 10**i % 10, b // 10**i % 10
        total = OPERATIONS[sign](x, y + carry)
        if total < 0:
            x, total = x + 10, total + 10
        parts = [x, y, carry] if carry else [x, y]
        carry = int(total > 9 if sign == "+" else x > 9)
        steps.append(f" {sign} ".join(map(str, parts)) + f" = {total}{word * carry}")
    return steps


def addition(random, largest):
    """(question, steps, answer) of the sum of two numbers up to the largest."""
    a, b = random.randint(0, largest), random.randint(0, largest)
    return f"What is {a} + {b}?", columns(a, b, "+"), a + b


def subtraction(random, largest):
    """(question, steps, answer) of a difference that is not below 0."""
    b, a = sorted([random.randint(0, largest), random.randint(0, largest)])
    return f"What is {a} - {b}?", columns(a, b, "-"), a - b


def comparison(random, largest):
    """(question, steps, answer) of which number is larger, by the first digit that differs."""
    a, b = random.sample(range(largest + 1), 2)
    x, y = (str(number).zfill(len(str(max(a, b)))) for number in (a, b))
    i = next(i for i in range(len(x)) if x[i] != y[i])
    step = f"{x} and {y} differ first in digit {i + 1}: {max(x[i], y[i])} is more than "
    return f"Which is larger, {a} or {b}?", [step + min(x[i], y[i])], max(a, b)


def word_problem(random, largest):
    """(question, steps, answer) of one of PROBLEMS; no result is below 0 or a fraction."""
    text, steps = random.choice(PROBLEMS)
    hero, friend = random.sample([*PEOPLE], 2)
    # A small divisor leaves no remainder more often, so fewer tries are needed.
    largest_c = 9 if any("/" in step for step in steps.values()) else largest
    while True:
        values = {name: random.randint(2, largest_c if name == "c" else largest)
                  for name in "abc"}
        lines = []
        for name, step in steps.items():
            x, sign, y = step.split()
            x, y = values[x], values[y]
            values[name] = OPERATIONS[sign](x, y) if sign != "/" or x % y == 0 else -1
            lines.append(f"{x} {sign} {y} = {values[name]}")
        if min(values.values()) >= 0:
            words = dict(hero=hero, friend=friend, items=random.choice(FIELDS["items"]))
            return text.format(**words, **values, **PRONOUNS[PEOPLE[hero]]), lines, values[name]


TASKS = addition, subtraction, comparison, word_problem


def arithmetic(n, seed=0, largest=99):
    """Yield n different pairs (question, worked solution); ValueError if there are not so many."""
    random, seen = Random(seed), set()
    for _ in range(n):
        for _ in range(1000):
            question, steps, answer = random.choice(TASKS)(random, largest)
            if question not in seen:
                break
        else:
            raise ValueError(f"no more than {len(seen):,} problems were found with numbers up to "
                             f"{largest}: take a smaller --n or a greater --largest")
        seen.add(question)
        yield question, f"{'. '.join(steps)}. The answer is {answer}."
