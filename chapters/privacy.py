"""
Personal data in a text: found by form, check sum and context, and replaced by a plain tag.

    python -m chapters.privacy                  # precision and recall on chapters/privacy.jsonl
    python -m chapters.privacy letters.txt      # the masked text; counts go to stderr; - is stdin

Rows of privacy.jsonl: text, kind (null: none) and found, the strings to be masked. One character of
each key is escaped, lest a scanner finds it. Examples are masked, too; private addresses are not.
"""

import json
import re
import sys
from collections import Counter
from ipaddress import ip_address
from pathlib import Path

if __name__ == "__main__":  # `python chapters/privacy.py` works as well, from any folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from data import read_documents
from tokenizer import Parser, run_command

# -----------------------------------------------------------------------------
# Whether a match is what it looks like. What is to be masked is its group "value".


def before(match, n=24):
    """The n characters before a value."""
    return match.string[max(0, match.start("value") - n):match.start("value")]


def is_luhn(number):
    """Whether a number has the check digit of cards (ISO/IEC 7812): is_luhn("79927398713")."""
    doubled = "".join(str(2 * int(digit)) for digit in number[-2::-2])
    return sum(map(int, number[::-2] + doubled)) % 10 == 0


def is_iban(match):
    """Whether an account number has its check sum, 1 modulo 97 (ISO 13616)."""
    account = re.sub("[ -]", "", match["value"]).upper()
    return int("".join(str(int(char, 36)) for char in account[4:] + account[:4])) % 97 == 1


def is_card(match):
    """Whether a number has a card network's first digits and length, and Luhn's sum."""
    number = re.sub("[^0-9]", "", match["value"])
    is_article = len(number) == 13 and sum(map(int, number + 2 * number[1::2])) % 10 == 0  # an EAN
    return is_luhn(number) and not is_article and re.fullmatch(
        "4(?:.{12}|.{15}|.{18})|5[1-5].{14}|2[2-7].{14}|3[47].{13}|35.{14,17}"
        "|3(?:0[0-5]|[689]).{11,16}|(?:5[06-8]|6).{14,18}", number)


VERSION = re.compile(r"(?i)(?:\b(?:v|ver|versions?|release|build|firmware|sec|section|chapter)"
                     r"\.?|§|[=<>!~]=)\s*\Z")


def is_public(match):
    """Whether an address is one of the public Internet; version and section numbers are none."""
    try:
        address = ip_address(match["value"])
    except ValueError:
        return False
    is_heading = before(match, 1) in "\n" and max(address.packed) < 20 and re.match(
        r"\.? [^\W\d_]", match.string[match.end():match.end() + 3])  # 2.1.3.4 Results
    return (address.is_global and not address.is_multicast and not is_heading
            and not VERSION.search(before(match)))


NO_PHONE = re.compile(  # decimals, dates, spans of years, IP addresses, rows of other numbers
    r"\+?\d+\.\d+|\d{4}-\d\d-\d\d.*|\d{1,2}([./-])\d{1,2}\1\d{4}.*|(?:19|20)\d\d ?- ?(?:19|20)\d\d"
    r"|\d{4} \d{4} \d{4}|\d{1,3}(?:\.\d{1,3}){3}|1\d\d \d{3} \d{4}|[1-9]\d\d [01]\d\d \d{4}")
NUMBERED = re.compile(r"(?i)\b(?:isbn|issn|doi|ean|order|invoice|patent|part)\b[^0-9\n]{0,12}\Z")


def is_phone(match):
    """Whether a number has the length and is none of another kind, and not round."""
    value, number = match["value"], re.sub("[^0-9]", "", match["value"])
    is_american = value[0] == "1" or re.match(r"\+ ?1\b", value)
    return (len(number) in ([11] if is_american else range(7, 16)) and len({*number}) > 2
            and not NO_PHONE.fullmatch(value) and not NUMBERED.search(before(match)))


def is_varied(match):
    """Whether a key has digits and so many other characters that it is no placeholder."""
    return len({*match["value"]}) > 6 and re.search("[0-9]", match["value"])


def is_random(match):
    """Whether a key has letters as well, and is no name, no path and no placeholder."""
    return (is_varied(match) and re.search("[A-Za-z]", match["value"]) and not re.match(
        r"(?i)[./~$%]|.*(?:your|example|change_?me|xxx)|(?-i:[a-z]+\d?(?:[._][a-z]+\d?)+)\Z",
        match["value"]))


def named(name, check=bool):
    """A check whether a name, a pattern, stands before a value, and whether that one is right."""
    name = re.compile(rf"(?i){name}\Z")
    return lambda match: name.search(before(match, 40)) and check(match)


# -----------------------------------------------------------------------------
# How each kind is written. Bounded repeats keep the search linear, a class in front makes it fast.

SECRET = (r"(?:pass(?:word|wd|phrase|code)?|pwd|secret|token|credentials?|auth|(?:api|access|"
          r"private|auth|client)[ _-]?key)[\"'\])]*\s*(?:[:=]>?|:=)\s*[\"'`]?")
KEY = r"""(?x) (?<![A-Za-z0-9_-]) (?P<value>(?:AKIA|ASIA)[A-Z0-9]{16} | gh[oprsu]_[A-Za-z0-9]{36,99}
    | (?:github_pat_|glpat-|hf_|xox[abeoprs]-)[\w-]{20,99} | AIza[\w-]{35}
    | [sr]k[-_](?=[\w-]{0,40}?\w{16})[\w-]{20,255} | (?<=earer\ )[\w.~+/=-]{20,8000}
    | eyJ[\w-]{8,8000}+\.[\w-]{8,8000}+\.[\w-]{8,8000}+) (?![A-Za-z0-9])"""
PEM = r"-----%s [A-Z0-9 ]{0,30}PRIVATE KEY(?: BLOCK)?-----"
PRIVATE_KEY = (rf"(?s)(?P<value>{PEM % 'BEGIN'}(?:(?:(?!-----).){{32,}}+{PEM % 'END'}"
               r"|(?:\s+[A-Za-z0-9+/=]{30,}+)+))")
LOGIN = r"""(?<=://)(?P<value>[^\s/:@"'<>]{1,64}+:[^\s/@"'<>]{3,64}+)(?=@)"""
ASSIGNED = (r"""[:=]>?[ \t]{0,3}["'`]?(?P<value>(?:[\w.+/=!@#$%^*~?-]|&(?!\w+=)){7,255}"""
            r"(?<![.!?])(?![\w(\[{]))")
EMAIL = (r"(?<![\w.%+-])(?!(?:git|hg|svn)@)(?P<value>[\w.%+-]{0,63}[\w%+-]@"
         r"(?![1-4]x\.)(?:[\w-]{1,63}\.){1,8}(?:[^\W\d_]{2,24}|xn--[\w-]{2,59}))"  # not icon@2x.png
         r"(?![\w@(\[]|[.-][\w<]|:[/~])")
# Length of an account number: its countries, by the IBAN registry.
IBAN_LENGTHS = {15: "NO", 16: "BE", 18: "DK FI FK FO GL NL SD", 19: "MK SI", 21: "CH HR LI LV",
                20: "AT BA EE KZ LT LU MN XK", 22: "BG BH CR DE GB GE IE ME RS VA",
                23: "AE GI IL IQ OM SO TL", 24: "AD CZ ES MD PK RO SA SE SK TN VG", 26: "IS TR",
                25: "LY PT ST", 27: "BI DJ FR GR IT MC MR SM", 29: "BR EG PS QA UA", 32: "LC",
                28: "AL AZ BY CY DO GT HN HU LB NI PL SV", 30: "JO KW MU YE", 31: "MT SC", 33: "RU"}
IBAN = r"(?i)(?<![A-Z0-9])(?=[A-Z]{2}[0-9]{2})(?P<value>%s)(?![A-Z0-9])" % "|".join(
    f"(?:{countries.replace(' ', '|')})[0-9]{{2}}(?:[ -]?[A-Z0-9]){{{length - 4}}}"
    for length, countries in IBAN_LENGTHS.items())
CARD = (r"(?P<value>[2-6](?<![\w.,/-].)(?:[0-9]{12,18}|[0-9]{3}(?P<gap>[ .-])[0-9]{4,6}(?P=gap)"
        r"[0-9]{4,5}(?:(?P=gap)[0-9]{1,4}){0,2}))(?![\w-]|\.[0-9])")
SSN = (r"(?P<value>[0-8](?<![\w.-].)[0-9]{2}(?<!000|666)(?P<gap>%s)(?!00)[0-9]{2}(?P=gap)"
       r"(?!0000)[0-9]{4})(?![\w-])")
TRAVELLER = (r"(?:passe?port|reisepass|pasaporte|passaporto|паспорт)(?:number|nummer|num|n[or]?|id|"
             r"card|is|was|holder|серия|номер|и|[\s:.,#(№°º/-])*+")
PASSPORT = (r"(?<![\w-])(?P<value>[A-Z]{0,3}[0-9]{6,9}|(?=(?:[A-Z]*[0-9]){4})[A-Z0-9]{8,9}"
            r"|[0-9]{2} ?[0-9]{2} [0-9]{6})(?![\w-])")
IPV6 = r"(?P<value>[23](?<![\w:.].)[0-9A-Fa-f]{3}(?:::?[0-9A-Fa-f]{1,4}){1,7}(?:::)?)(?!\w|:[\w:])"
IPV4 = r"(?P<value>[0-9](?<![\w.~^-].)[0-9]{0,2}(?:\.[0-9]{1,3}){3})(?![\w-]|\.[\w])"
SEP = r"(?:\)?[ ./\xa0‐-–-]\(?|[()])?"
ABROAD = rf"(?:1|7|[2-9][0-9]{{1,2}})(?:{SEP}[0-9]){{6,12}}"
PHONE = (r"(?P<value>[+(0-9](?<![\w./+-].)(?:(?:(?<=1)[ .-](?:\([0-9]{3}\) ?|[0-9]{3}[-. ‐-–])"
         r"|(?<=\()[0-9]{3}\) ?|(?<=[0-9])[0-9]{2}[-. ‐-–])[0-9]{3}[-. ‐-–][0-9]{4}|(?:(?<=\+) ?"
         rf"{ABROAD}|(?<![0-9][, ].)(?<!PHONE>[, ].)(?:(?<=0)(?:0(?=[0-9]{{2,3}}[ -])|0 |11[ -])"
         rf"{ABROAD}|(?<=0)[1-9]-[0-9]{{4}}-[0-9]{{4}}|(?<=0)[1-9](?P<gap>[ .-])[0-9]{{2}}"
         r"(?:(?P=gap)[0-9]{2}){3}|(?:(?<=\()0[1-9][0-9]{1,3}\)|(?<=0)[1-9][0-9]{1,3})[ /-]{1,3}"
         r"(?:[0-9]{1,4}[ -]){0,3}[0-9]{2,8}))(?! (?:[0-9]|<PHONE))))(?!\w|[./-][0-9])")
NUMBER = (r"(?P<value>[+(0-9](?<![\w.].)(?:(?<=\+)\()?(?:(?<=[+(])[0-9])?(?<=[0-9])"
          rf"(?:{SEP}[0-9]){{6,14}})(?!\w|[.,:/-][0-9]| ?%)")
LINE = (r"(?:\b(?:t[eé]l|t[eé]l[eé](?:ph|f)on[eo]?|phone|mobile?|cell|fax|call|text|sms|hotline|"
        r"whatsapp|тел|телефон|móvil)\b|手机|手機|电话|電話)[^0-9<>\n]{0,20}")
# Seven digits close by, or K123456, 7a1 or A1B: without any of them a text has no number or key.
DENSE = r"[0-9](?:[0-9]{5}(?<=[A-Z].{6})|(?:[^0-9\n]{0,3}[0-9]){6}|[A-z]+[0-9]|(?<=[A-Z].)[A-Z])"
RULES = [(kind, gate, re.compile(pattern), *more) for kind, gate, pattern, *more in (
    # kind, quick test of a text, pattern, check of a match, words of which it has one in any case
    ("key", "PRIVATE KEY", PRIVATE_KEY, bool),  # the most specific first
    ("key", DENSE, KEY, is_varied, *"akia asia gho_ ghp_ ghr_ ghs_ ghu_ github_ glpat- hf_ xox "
                                    "aiza sk- sk_ rk- rk_ earer eyj".split()),
    ("key", "://", LOGIN, bool),
    ("key", "[=:]", ASSIGNED, named(SECRET, is_random)),
    ("email", r"@[\w-]{1,63}\.", EMAIL, bool),
    ("iban", DENSE, IBAN, is_iban),
    ("card", DENSE, CARD, is_card),
    ("ssn", DENSE, SSN % "[-‐-–]", bool),
    ("ssn", DENSE, SSN % " ?", named(r"\b(?:ssn|social security)\b[^0-9<>\n]{0,20}")),
    ("passport", DENSE, PASSPORT, named(TRAVELLER), "pass", "pasaporte", "паспорт"),
    ("ipv6", ":[0-9A-Fa-f]{0,4}:", IPV6, is_public),
    ("ipv4", r"\.[0-9]{1,3}\.", IPV4, is_public),
    ("phone", DENSE, PHONE, is_phone),
    ("phone", DENSE, NUMBER, named(LINE, is_phone)))]
TAG = re.compile(f"<(?:{'|'.join(kind.upper() for kind, *_ in RULES)})>\\Z")
KINDS = tuple(dict.fromkeys(kind for kind, *_ in RULES))

# -----------------------------------------------------------------------------
# Masking, and how well it does.


def masked(text, kinds):
    """(masked text, list of (kind, string) found); of what overlaps the more specific one is."""
    found, is_open = [], {gate: re.search(gate, text) for gate in {rule[1] for rule in RULES}}

    def replace(match):
        if TAG.search(before(match, 10)) or not check(match):
            return match[0]  # what is glued to a tag stays, or masking twice would find it
        found.append((kind, match["value"]))
        (start, end), first = match.span("value"), match.start()
        return f"{match[0][:start - first]}<{kind.upper()}>{match[0][end - first:]}"

    for kind, gate, pattern, check, *words in (rule for rule in RULES if rule[0] in kinds):
        if is_open[gate] and (not words or any(map(text.lower().__contains__, words))):
            text = pattern.sub(replace, text)
    return text, found


def mask_pii(text, kinds=KINDS):
    """(text with personal data replaced, {kind: count}): mask_pii("to a@b.org")[0] == "to <EMAIL>".
    Raises ValueError for a kind that is none of KINDS."""
    if unknown := {*kinds} - {*KINDS}:
        raise ValueError(f"{', '.join(sorted(unknown))}: the kinds are {', '.join(KINDS)}")
    text, found = masked(text, kinds)
    return text, Counter(kind for kind, _ in found)


def measure(rows):
    """{kind: (precision, recall, number to be found)} of masking on rows as in privacy.jsonl."""
    tally = {kind: [0, 0, 0] for kind in KINDS}  # right, found, wanted
    for row in rows:
        wanted = Counter((row["kind"], string) for string in row["found"])
        found = Counter(masked(row["text"], KINDS)[1])
        for i, strings in enumerate((wanted & found, found, wanted)):
            for kind, _ in strings.elements():
                tally[kind][i] += 1
    return {kind: (right / max(1, n_found), right / max(1, n_wanted), n_wanted)
            for kind, (right, n_found, n_wanted) in tally.items()}


GROUPS = {  # words for them, by dimension; not each "old" or "black" is said of people
    "gender": "woman women man men girl girls boy boys she her hers he him his male female lady",
    "orientation": "gay lesbian bisexual transgender heterosexual homosexual queer lgbt",
    "religion": "christian christians muslim muslims jew jews jewish hindu buddhist sikh catholic",
    "ethnicity": "black white asian hispanic latino latina arab arabs african indigenous roma",
    "nationality": "american british chinese french german indian italian japanese mexican russian",
    "age": "child children teenager teenagers young old elderly senior seniors adult adults",
    "disability": "disabled disability blind deaf autistic wheelchair"}


def group_words(text):
    """Counter of {"dimension: word": n} for the words of GROUPS in a text, in any case."""
    words = Counter(re.findall("[a-z]+(?:-[a-z]+)*", text.lower()))
    return Counter({f"{dimension}: {word}": words[word] for dimension, names in GROUPS.items()
                    for word in names.split() if word in words})


def main():
    parser = Parser(__doc__)
    parser.add_argument("file", nargs="?", help="text to mask, - for stdin; none: the table")
    file, total = parser.parse_intermixed_args().file, Counter()
    if file is None:
        rows = Path(__file__).with_name("privacy.jsonl").read_text("utf-8").splitlines()
        for kind, values in measure(map(json.loads, rows)).items():
            print("{:9} precision {:.3f}, recall {:.3f} of {:3}".format(kind, *values))
        return
    for text in [(sys.stdin or open(0)).read()] if file == "-" else read_documents(file):  # or <&-
        text, counts = mask_pii(text)
        total += counts
        print(text)
    print(", ".join(f"{kind} {n:,}" for kind, n in total.items()) or "nothing", file=sys.stderr)


if __name__ == "__main__":
    run_command(main)
