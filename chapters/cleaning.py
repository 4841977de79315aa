"""
Cleaning stages: functions from a text to a text, in the order in which they are applied.

    for name in DEFAULT:
        text = STAGES[name](text)

Each is idempotent (a second time it changes nothing), needs no other one and takes linear time.
"""

import re
import unicodedata

import regex

from data import CONTROLS, ESCAPES, LINE_ENDS, OVERSTRUCK

# -----------------------------------------------------------------------------
# Line ends, control characters, Unicode normalisation and white space: the default stages.

SPACES = re.compile("[\xa0\u1680\u2000-\u200a\u202f\u205f\u3000]")

# A joiner is part of the spelling after letters of Arabic, Syriac, N'Ko, Indic, Burmese, Khmer and
# Mongolian script, and makes one of two emoji; tags after a black flag name the flag of a region.
JOINING = "[\u0610-\u061a\u061d-\u0dff\u0f00-\u109f\u1780-\u180d\u180f-\u18aa\ua840-\ua8ff]"
EMOJI = "[\u2190-\u21ff\u2300-\u27bf\u2b00-\u2bff\ufe0f\u20e3\U0001f000-\U0001faff]"
INVISIBLE = regex.compile(
    "(\U0001f3f4[\U000e0030-\U000e007a]{3,6}\U000e007f)|[\U000e0001\U000e0020-\U000e007f]"
    rf"|[\u200c\u200d\u180e](?<!{JOINING}\p{{M}}*.)(?:(?<!{EMOJI}\u200d)|(?!{EMOJI}))"
    "|[\xad\u061c\u200b\u200e\u200f\u202a-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb]")

# Long runs of what normalisation may reorder: combining marks, and characters that begin with one.
MARKS = {form: regex.compile(rf"(?:[^\p{{ccc=0}}]|[\u0f73\u0f75\u0f81{more}]){{32,}}")
         for form, more in (("NFC", ""), ("NFKC", "\uff9e\uff9f"))}


def is_plain(text):
    """Whether each character is printable or \\n: no control, invisible or rare space character."""
    return text.replace("\n", "").isprintable()


def line_ends(text):
    """Write CR, CRLF, VT, FF, NEL, U+2028 and U+2029 as \\n: line_ends("a\\r\\nb") == "a\\nb"."""
    return text if is_plain(text) else LINE_ENDS.sub("\n", text)


def controls(text):
    """Remove controls, terminal escape sequences, zero-width and bidi characters, soft hyphens.
    Joiners stay where a script or an emoji needs them, line ends for line_ends."""
    if is_plain(text):
        return text
    if CONTROLS.search(text):
        text = OVERSTRUCK.sub("", ESCAPES.sub("", text))
        text = CONTROLS.sub(lambda char: char[0] if LINE_ENDS.match(char[0]) else "", text)
    return text if text.isascii() else INVISIBLE.sub(r"\1", text)


def normalize(text, form):
    """unicodedata.normalize in linear time: alone it takes n**2 steps to sort a run of n marks."""
    def in_order(run):
        apart = [unicodedata.normalize(form.replace("C", "D"), mark) for mark in run[0]]
        return "".join(sorted("".join(apart), key=unicodedata.combining))

    if text.isascii() or unicodedata.is_normalized(form, text):
        return text
    return unicodedata.normalize(form, MARKS[form].sub(in_order, text))


def nfc(text):
    """Normalize to Unicode's form C, composed letters: nfc("e\\u0301") == "\\u00e9"."""
    return normalize(text, "NFC")


def nfkc(text):
    """Normalize to form KC, in which full-width, superscript and joined letters are plain ones."""
    return normalize(text, "NFKC")


def white_space(text):
    """Write each Unicode space as a plain one; no space at line ends, at most two blank lines.
    Runs of spaces within a line stay: they align code, tables and verse."""
    text = text if text.isascii() or is_plain(text) else SPACES.sub(" ", text)
    if " \n" in text or "\t\n" in text or text[-1:] in (" ", "\t"):
        text = "\n".join([line.rstrip(" \t") for line in text.split("\n")])
    return re.sub(r"\n\n\n\n+", "\n\n\n", text).strip("\n")


# -----------------------------------------------------------------------------
# Options: letters, signs and English words.

# Emoji of UTS #51: pictures by default, or because of a mark after them, and all joined to them.
MARK = r"[\ufe0f\u20e3\u200d\p{Emoji_Modifier}\U000e0020-\U000e007f]"
ONE = (rf"(?:[0-9#*]\ufe0f?\u20e3|\p{{Emoji_Presentation}}(?!\ufe0e)"
       rf"|\p{{Extended_Pictographic}}(?={MARK})){MARK}*+"
       rf"(?:(?<=\u200d)\p{{Extended_Pictographic}}{MARK}*+)*+")
EMOJIS = regex.compile(rf"(?m)^(?:{ONE})++ ?| (?:{ONE})++(?=[\s.,;:!?]|\Z)|(?:{ONE})++")

SIGNS = {"'": "‘’‚‛‹›′´", '"': "“”„‟«»″", "-": "\u2010\u2011‒–−", "--": "—―", "...": "…"}
QUOTES = str.maketrans({sign: plain for plain, signs in SIGNS.items() for sign in signs})

# Latin, Cyrillic and Greek letters that look alike; not the Greek ones that formulas use.
ALIKE = ("AАΑ BВΒ CС. EЕΕ HНΗ IІΙ JЈ. KКΚ MМΜ N.Ν OОΟ PРΡ SЅ. TТΤ XХΧ YУΥ Z.Ζ "
         "aа. cс. eе. iі. jј. oоο pр. sѕ. xх. yу. ËЁ. ëё. ÏЇΪ ïї.").split()
SCRIPTS = "A-Za-z\xc0-\xd6\xd8-\xf6\xf8-\u024f\u1e00-\u1eff", "\u0400-\u052f", "\u0370-\u03ff"
TO_SCRIPT = [str.maketrans({letter: row[i] for row in ALIKE if row[i] != "."
                            for letter in row if letter != "."}) for i in range(3)]
LATIN, CYRILLIC, GREEK = (f"[{script}]++(?!\\b)" for script in SCRIPTS)
MIXED = re.compile(rf"(?<!\w)(?:{LATIN}|{CYRILLIC}|{GREEK})[{''.join(SCRIPTS)}]++(?!\w)")


def emoji(text):
    """Remove emoji, also flags, keycaps, skin tones and families, with the space before them."""
    return text if text.isascii() else EMOJIS.sub("", text)


def one_script(word):
    """A matched word in the script of most of its letters, if each has a look-alike there."""
    n_letters = [len(re.findall(f"[{script}]", word[0])) for script in SCRIPTS]
    n_letters[2] -= 0.5  # a tie, as in a formula ("ΔE"), is not decided for Greek
    for script, n, table in zip(SCRIPTS, n_letters, TO_SCRIPT):
        moved = word[0].translate(table)
        if n == max(n_letters) and re.fullmatch(f"[{script}]+", moved):
            return moved
    return word[0]


def homographs(text):
    """Write look-alike letters within a word in one script: Latin for a Cyrillic a in "paypal"."""
    return text if text.isascii() else MIXED.sub(one_script, text)


def quotes(text):
    """Write typographic quotes, dashes, ellipses in ASCII: quotes("\\u201ca\\u201d") == '"a"'."""
    return text if text.isascii() else text.translate(QUOTES)


def lower_case(text):
    """Write all letters in lower case."""
    return text.lower()


SPELLINGS = """
abscence absence accomodate accommodate accomodation accommodation accross across acheive achieve
acheivement achievement acknowlege acknowledge adress address agressive aggressive amatuer amateur
apparant apparent appearence appearance arguement argument basicly basically becasue because
becuase because begining beginning beleive believe beleived believed buisness business
calender calendar cemetary cemetery cheif chief collegue colleague comming coming commitee committee
completly completely concious conscious consistant consistent definately definitely
definatly definitely diffrent different dilemna dilemma dissapointed disappointed embarass embarrass
embarassing embarrassing enviroment environment excercise exercise existance existence
experiance experience febuary february foriegn foreign fourty forty freind friend freinds friends
garantee guarantee gaurd guard goverment government grammer grammar happend happened harrass harass
immediatly immediately independant independent interupt interrupt knowlege knowledge lenght length
liason liaison libary library maintainence maintenance maintenence maintenance mispell misspell
neccessary necessary necessery necessary nieghbor neighbor noticable noticeable occassion occasion
occured occurred occurence occurrence occuring occurring parliment parliament peice piece
percieve perceive performence performance preceeding preceding prefered preferred
privelege privilege probly probably pronounciation pronunciation publically publicly
questionaire questionnaire realy really reccomend recommend recieve receive recieved received
recieving receiving recomend recommend refered referred remeber remember repitition repetition
restarant restaurant rythm rhythm saftey safety sentance sentence seperate separate similiar similar
sincerly sincerely speach speech strenght strength succesful successful successfull successful
suprise surprise teh the tendancy tendency thier their tommorrow tomorrow tounge tongue truely truly
untill until usefull useful vaccum vacuum visable visible wich which wierd weird writting writing
yeild yield
""".split()
MISSPELLED = dict(zip(SPELLINGS[::2], SPELLINGS[1::2]))  # {wrong: right}
MISSPELLING = re.compile(rf"(?i)(?<![\w@/.])(?:{'|'.join(MISSPELLED)})(?![\w@/]|\.\w)")

# {(short form, full form): words before it}; 's and 'd can mean several words and stay.
TAILS = {("n't", " not"): "are could did do does had has have is might must should was were would",
         ("n't've", " not have"): "could might must should would",
         ("'re", " are"): "we you they who what there where how",
         ("'ve", " have"): "i you we they who could might must should would",
         ("'ll", " will"): "i you he she it we they who what this that there",
         ("'m", " am"): "i", ("'s", " us"): "let", ("n't", "nnot"): "ca", ("on't", "ill not"): "w"}
FULL = {before + short: (before, full) for (short, full), words in TAILS.items()
        for before in words.split()}
SHORT = re.compile(r"\b[A-Za-z]{1,6}(?:['\u2019][A-Za-z]{1,2}){1,2}\b")


def in_case(like, text):
    """A lower-case text in the case of another: in_case("Teh", "the") == "The"."""
    return text.upper() if like.isupper() else text.capitalize() if like[0].isupper() else text


def misspellings(text):
    """Correct common English misspellings: misspellings("Teh end") == "The end"."""
    if MISSPELLED.keys().isdisjoint(re.findall("[a-z]+", text.lower())):
        return text
    return MISSPELLING.sub(lambda word: in_case(word[0], MISSPELLED[word[0].lower()]), text)


def full_form(short):
    """The full form of a matched word such as "don't", in the case of its two parts."""
    before, full = FULL.get(short[0].lower().replace("\u2019", "'"), (short[0], ""))
    return short[0][:len(before)] + (full.upper() if short[0][len(before):].isupper() else full)


def contractions(text):
    """Write out English short forms: contractions("I don't") == "I do not"; 's and 'd stay."""
    return SHORT.sub(full_form, text) if "'" in text or "\u2019" in text else text


# In order: nfc comes after what can change the letter before a mark, white_space comes last.
STAGES = {stage.__name__: stage for stage in (
    line_ends, controls, nfkc, lower_case, emoji, homographs, nfc, quotes, misspellings,
    contractions, white_space)}
DEFAULT = ["line_ends", "controls", "nfc", "white_space"]

# -----------------------------------------------------------------------------
# Splitting: from a long document to pieces.

# A sentence does not end after an abbreviation, initial or short number, or before a small letter.
CLOSING = r"""['"\u2019\u201d\xbb)\]\u300d\u300f\uff09]"""
STOPS = r"[\u3002\uff01\uff1f\u0964\u0965\u061f\u06d4]"  # they need no space after them
NO_END = ("mr|mrs|ms|dr|prof|st|jr|sr|vs|nos?|figs?|eqs?|vol|pp|eds?|inc|ltd|corp?|dept|gen|col|lt|"
          "sgt|capt|rev|hon|gov|sen|rep|jan|feb|mar|apr|jun|jul|aug|sept?|oct|nov|dec|approx|ca|nr")
BLANK = r"\n(?:[ \t]*+\n)++"
ENDING = (rf"(?=\s)(?<=[.!?\u2026]{CLOSING}*)(?<!(?:\b(?i:\p{{L}}|{NO_END})|(?<![\d.,])\d\d?)\.)"
          rf"\s++(?!\p{{Ll}})|(?!{CLOSING}|{STOPS})(?<={STOPS}{CLOSING}*)\s*+|{BLANK}")
PARAGRAPHS, SENTENCES, LINES, WORDS = map(regex.compile, (BLANK, ENDING, "\n", r"\s++"))


def cut(text, limit, *levels):
    """Pieces of at most `limit` characters, cut where the first pattern matches, else the next."""
    if limit < 1:
        raise ValueError(f"limit={limit} must be at least 1 character")
    if len(text) <= limit or not levels:
        return [text[i:i + limit] for i in range(0, len(text), limit) if text.strip()]
    pieces, start, end, part_start = [], 0, 0, 0  # the piece so far is text[start:end]
    borders = [border.span() for border in levels[0].finditer(text)]
    for part_end, next_start in [*borders, (len(text), len(text))]:
        if part_end - start > limit:  # the part does not fit into the piece
            pieces.append(text[start:end])
            start = part_start
        if part_end - start > limit:  # the part alone is too long
            pieces += cut(text[start:part_end], limit, *levels[1:])
            start = next_start
        end, part_start = part_end, next_start
    return [piece for piece in [*pieces, text[start:end]] if piece.strip()]


def split_paragraphs(text, limit):
    """Split a text at blank lines into pieces of at most `limit` characters, else at sentences."""
    return cut(text, limit, PARAGRAPHS, SENTENCES, LINES, WORDS)


def split_sentences(text, limit):
    """Split a text at ends of sentences: split_sentences("Yes. No.", 5) == ["Yes.", "No."]."""
    return cut(text, limit, SENTENCES, LINES, WORDS)
