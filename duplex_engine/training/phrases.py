"""The closed world of the reference interaction model: every text that is spoken or put out.

Owns the lists, questions, commands and sentences, and from them the texts a speech bank must hold
(``WORDS``, ``PHRASES``, ``MISPRONOUNCED``, ``FOREIGN``). It knows nothing of sound or tokens;
read ``vocabulary.py`` for the token ids and ``episodes.py`` for how streams are composed.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


def _distinct(texts: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(texts))


# --- lists the model knows in order ---------------------------------------------------------
NUMBERS = _words(
    "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen twenty"
)
DAYS = _words("monday tuesday wednesday thursday friday saturday sunday")
MONTHS = _words(
    "january february march april may june july august september october november december"
)

# --- classes without an order ---------------------------------------------------------------
COLOURS = _words("red green blue yellow white black brown orange pink purple")
ANIMALS = _words("dog cat cow duck sheep horse bird fish lion mouse")
OBJECTS = _words(
    "table chair window door bottle paper garden river bridge house shoe book lamp cup key"
)
SHAPES = _words("circle square triangle")
FILLERS = _words("um uh er well hmm")
BACK_CHANNELS = ("mhm", "uh-huh", "yeah", "okay", "right", "i see", "really")
STOP_COMMANDS = ("stop", "wait", "hold on", "be quiet")
THANKS = ("thank you", "thanks")
CANCELS = ("never mind", "forget it")

# --- sentences known by heart: a wrong or a mispronounced word in them is corrected -----------
SENTENCES = (
    "twinkle twinkle little star how i wonder what you are",
    "mary had a little lamb its fleece was white as snow",
    "jack and jill went up the hill to fetch a pail of water",
    "humpty dumpty sat on a wall humpty dumpty had a great fall",
    "row row row your boat gently down the stream",
    "the quick brown fox jumps over the lazy dog",
    "an apple a day keeps the doctor away",
    "hickory dickory dock the mouse ran up the clock",
)
# (sentence, index of the replaced word, wrong word); each makes one phrase
WRONG_SENTENCES: tuple[tuple[int, int, str], ...] = (
    (0, 2, "yellow"),
    (0, 3, "fish"),
    (0, 6, "remember"),
    (0, 8, "they"),
    (1, 1, "lost"),
    (1, 4, "horse"),
    (1, 8, "black"),
    (1, 10, "milk"),
    (2, 2, "john"),
    (2, 6, "river"),
    (2, 10, "cup"),
    (2, 12, "milk"),
    (3, 2, "slept"),
    (3, 5, "chair"),
    (3, 10, "big"),
    (3, 11, "day"),
    (4, 2, "pull"),
    (4, 4, "car"),
    (4, 6, "up"),
    (4, 8, "river"),
    (5, 6, "slow"),
    (5, 2, "red"),
    (5, 3, "cat"),
    (5, 8, "horse"),
    (6, 1, "orange"),
    (6, 3, "week"),
    (6, 6, "teacher"),
    (6, 4, "drives"),
    (7, 4, "duck"),
    (7, 5, "sat"),
    (7, 8, "table"),
    (7, 2, "door"),
)


@dataclass(frozen=True)
class Question:
    """A question in spoken parts (a hesitation may fall between two parts) and its answer.

    Every part is itself one of ``WORDS`` or ``PHRASES``; ``whole`` says that the joined text is
    one of ``PHRASES`` too.
    """

    parts: tuple[str, ...]
    answer: tuple[str, ...]
    whole: bool = True

    @property
    def text(self) -> str:
        """The question as one line."""
        return " ".join(self.parts)


def _neighbour_questions() -> list[Question]:
    questions = []
    for items, cyclic in ((NUMBERS, False), (DAYS, True), (MONTHS, True)):
        for index, item in enumerate(items):
            if cyclic or index + 1 < len(items):
                after = items[(index + 1) % len(items)]
                questions.append(Question(("what comes after", item), (after,)))
            if cyclic or index > 0:
                questions.append(Question(("what comes before", item), (items[index - 1],)))
    return questions


def _sum_questions() -> list[Question]:
    return [
        Question(
            ("what is", NUMBERS[a - 1], "plus", NUMBERS[b - 1]),
            (NUMBERS[a + b - 1],),
            whole=(7 * a + 3 * b) % 9 < 4,
        )
        for a in range(1, 10)
        for b in range(1, 10)
    ]


def _slots(opening: str, pairs: str, closing: str = "") -> list[Question]:
    questions = []
    for pair in pairs.split():
        slot, answer = pair.split("=")
        parts = (opening, slot.replace("_", " ")) + ((closing,) if closing else ())
        questions.append(Question(parts, tuple(answer.split("_"))))
    return questions


QUESTIONS: tuple[Question, ...] = (
    *_neighbour_questions(),
    *_sum_questions(),
    *_slots(
        "what colour is",
        "grass=green snow=white blood=red the_sky=blue coal=black chocolate=brown a_banana=yellow "
        "a_carrot=orange",
    ),
    *_slots("what sound does a", "dog=woof cat=meow cow=moo duck=quack sheep=baa", "make"),
    *_slots("how many legs does a", "dog=four spider=eight bird=two fish=none", "have"),
    *_slots(
        "what is the opposite of",
        "hot=cold big=small up=down left=right open=closed fast=slow happy=sad old=new",
    ),
    Question(("can you", "hear me"), ("yes",)),
    Question(("are you", "there"), ("yes",)),
)

# --- long answers, put out one word a micro-turn ---------------------------------------------
STORY = _words(
    "mary had a little lamb its fleece was white as snow and where she went the lamb was sure to go"
)
LONG_ANSWERS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("count to ten", NUMBERS[:10]),
    ("count to twenty", NUMBERS),
    ("count down from ten", NUMBERS[9::-1]),
    ("name the days", DAYS),
    ("name the months", MONTHS),
    ("tell me a story", STORY),
)

# --- running lists: say each word of one class as it is heard ---------------------------------
RUNNING_LISTS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("call out the colours", COLOURS),
    ("call out the numbers", NUMBERS),
    ("call out the animals", ANIMALS),
)
# a number sequence that follows one of these is no list, so nothing in it is wrong
RANDOM_OPENINGS = ("here are random words", "my phone number is", "this is not in order")
LIST_OPENINGS = ("let me count", "listen to my list", "these are in order")

# --- delegation ------------------------------------------------------------------------------
CITIES = _words("paris london rome berlin tokyo madrid oslo vienna")
THINGS = _words("gold milk bread oil coffee sugar")
NAMES = _words("newton mozart darwin picasso einstein shakespeare")


@dataclass(frozen=True)
class Request:
    """A question for the background model: spoken parts, and the words delegated."""

    parts: tuple[str, ...]
    words: tuple[str, ...]

    @property
    def text(self) -> str:
        """The request as one line."""
        return " ".join(self.parts)


REQUESTS: tuple[Request, ...] = (
    *(Request(("what is the weather in", city), ("weather", city)) for city in CITIES),
    *(Request(("when is the train to", city), ("train", city)) for city in CITIES),
    *(Request(("what is the price of", thing), ("price", thing)) for thing in THINGS),
    *(Request(("who is", name), ("who", name)) for name in NAMES),
)
RESULT_WORDS = _words(
    "sunny rainy cloudy windy snowy foggy warm cold late early today tomorrow soon closed "
    "painter writer scientist composer euros dollars oclock degrees high low"  # codespell:ignore
)

# --- speech that asks for nothing --------------------------------------------------------------
# One of each makes a sentence; every voice has its own few, so that none is learnt by heart.
CHATTER = (
    (
        "my brother", "the old captain", "our neighbour", "a young student", "the postman",
        "her cousin", "the whole family", "nobody here", "every driver", "this machine",
        "the mayor", "his uncle", "the new nurse", "a tall stranger", "the farmer",
        "somebody else", "i", "we", "they", "you",
    ),
    (
        "lost the tickets", "painted the kitchen", "found an old map", "sold the bicycle",
        "forgot the password", "repaired the radio", "baked a cake", "wrote a long letter",
        "missed the last bus", "opened the curtains", "asked for more time", "carried the boxes",
        "watched the game", "cleaned the garage", "ordered some soup", "kept the engine running",
        "will move to another room", "should leave early", "went to the market",
        "never answered the phone", "put everything on the shelf", "might need an umbrella",
        "talked about politics", "laughed at the joke",
    ),
    (
        "last night", "before breakfast", "after the meeting", "on the way home",
        "without any reason", "in the afternoon", "during the holidays", "at the station",
        "for his mother", "with great care", "as usual", "again and again", "once more",
        "behind the church", "because of the rain", "",
    ),
)  # fmt: skip
# (language of the synthesiser, text)
FOREIGN: tuple[tuple[str, str], ...] = (
    ("de", "ich gehe heute abend ins kino"),
    ("de", "das wetter ist heute sehr schön"),  # codespell:ignore
    ("fr", "je voudrais un café s'il vous plaît"),
    ("fr", "nous partons demain matin"),
    ("es", "mañana vamos a la playa"),
    ("es", "no sé dónde está mi hermano"),
    ("it", "questa sera mangiamo la pizza"),
    ("it", "il treno parte fra poco"),
    ("ru", "сегодня очень хорошая погода"),
    ("nl", "ik heb gisteren een boek gekocht"),
    ("pl", "dzisiaj jest piękny dzień"),
    ("sv", "jag tycker om att läsa"),
    ("de", "können sie mir bitte den weg zum bahnhof zeigen"),
    ("de", "unsere nachbarn haben gestern einen kleinen hund gekauft"),
    ("de", "eins zwei drei vier fünf sechs sieben"),
    ("de", "am wochenende fahren wir an den see"),
    ("fr", "ma soeur habite depuis deux ans en bretagne"),
    ("fr", "il fait trop froid pour sortir ce soir"),
    ("fr", "un deux trois quatre cinq six sept"),
    ("fr", "où avez vous laissé les clefs de la voiture"),
    ("es", "el tren sale a las ocho de la mañana"),
    ("es", "uno dos tres cuatro cinco seis siete"),
    ("es", "tengo que comprar pan y leche"),
    ("es", "mi abuela cuenta historias muy largas"),
    ("it", "uno due tre quattro cinque sei sette"),
    ("it", "domani mio fratello va a roma con gli amici"),
    ("it", "non trovo più i miei occhiali"),
    ("ru", "мы живём в большом старом доме"),
    ("ru", "один два три четыре пять шесть семь"),
    ("ru", "завтра я поеду к бабушке в деревню"),
    ("nl", "morgen gaan we met de trein naar zee"),
    ("nl", "een twee drie vier vijf zes zeven"),
    ("nl", "de kinderen spelen buiten in de tuin"),
    ("pl", "moja siostra mieszka nad morzem"),
    ("pl", "jeden dwa trzy cztery pięć sześć siedem"),
    ("pl", "gdzie jest najbliższy sklep"),
    ("sv", "ett två tre fyra fem sex sju"),
    ("sv", "vi åker till stugan på fredag"),
    ("sv", "hunden sover under bordet i köket"),
    ("ro", "mâine mergem cu toții la munte"),
    ("ro", "copiii se joacă în curtea școlii"),
    ("tr", "yarın sabah erkenden yola çıkıyoruz"),  # noqa: RUF001
    ("tr", "çocuklar bahçede top oynuyor"),
    ("id", "besok pagi kami pergi ke pasar"),
    ("id", "anak anak bermain di halaman sekolah"),
    ("sw", "kesho tutakwenda sokoni asubuhi"),
    ("sw", "watoto wanacheza nje ya nyumba"),
    ("hr", "sutra putujemo vlakom na more"),
    ("hr", "moj brat ima staru crvenu kuću"),
)

# Languages that no training hears.
HELD_FOREIGN: tuple[tuple[str, str], ...] = (
    ("fi", "huomenna lähdemme junalla pohjoiseen"),
    ("fi", "kissa nukkuu keittiön pöydän alla"),
    ("da", "vi rejser tidligt i morgen"),
    ("da", "børnene leger i haven"),
    ("hu", "holnap reggel korán indulunk"),
    ("hu", "a könyv az asztalon fekszik"),
    ("cs", "zítra ráno pojedeme na hory"),
    ("cs", "děti si hrají na zahradě"),
    ("el", "αύριο θα πάμε στη θάλασσα"),
    ("el", "το τρένο φεύγει σε λίγο"),
    ("pt", "amanhã vamos viajar para o norte"),
    ("pt", "a chuva não parou durante a noite"),
)

# (known word, espeak-ng phonemes of a wrong pronunciation that is no other word of this file, and a
# spelling of something like it for engines that take none)
MISPRONOUNCED: tuple[tuple[str, str, str], ...] = (
    ("one", "'oUn", "oan"),  # codespell:ignore
    ("two", "tw'oU", "twoe"),  # codespell:ignore
    ("three", "T'aI", "thigh"),  # codespell:ignore
    ("four", "f'aU", "phow"),  # codespell:ignore
    ("five", "f'Iv", "fiv"),  # codespell:ignore
    ("six", "s'aIks", "sykes"),  # codespell:ignore
    ("seven", "s'i:v@n", "seeven"),  # codespell:ignore
    ("eight", "'aIkt", "iked"),  # codespell:ignore
    ("nine", "n'In", "ninn"),  # codespell:ignore
    ("ten", "t'oIn", "toyn"),  # codespell:ignore
    ("monday", "d'VndeI", "dunday"),  # codespell:ignore
    ("tuesday", "t'u:kdeI", "tookday"),  # codespell:ignore
    ("wednesday", "w'EdnEsdeI", "wedness day"),  # codespell:ignore
    ("thursday", "T'A:mzdeI", "thahmsday"),  # codespell:ignore
    ("friday", "fr'i:deI", "freeday"),  # codespell:ignore
    ("saturday", "s'ItUgdeI", "sittugday"),  # codespell:ignore
    ("sunday", "s'UndeI", "soonday"),  # codespell:ignore
    ("january", "dZ'anu:gri", "janoogry"),  # codespell:ignore
    ("february", "f'EblU@ri", "febblury"),  # codespell:ignore
    ("april", "'aIpr@l", "eyepril"),  # codespell:ignore
    ("august", "'aUgUst", "owgust"),  # codespell:ignore
    ("october", "0kt'u:b@", "octoober"),  # codespell:ignore
    ("twinkle", "tw'aINk@l", "twynkle"),  # codespell:ignore
    ("little", "l'aIt@l", "lytel"),  # codespell:ignore
    ("star", "st'OI", "stoy"),  # codespell:ignore
    ("wonder", "w'Imd@", "wimder"),  # codespell:ignore
    ("mary", "m'u:ri", "moory"),  # codespell:ignore
    ("lamb", "l'aImb", "limeb"),  # codespell:ignore
    ("fleece", "fl'aIs", "flyse"),  # codespell:ignore
    ("white", "w'u:t", "woot"),  # codespell:ignore
    ("snow", "sn'aU", "snau"),  # codespell:ignore
    ("water", "w'Ig@", "wibber"),  # codespell:ignore
    ("hill", "h'u:l", "hool"),  # codespell:ignore
    ("wall", "w'Ib", "wibb"),  # codespell:ignore
    ("boat", "b'aIt", "bite"),  # codespell:ignore
    ("stream", "str'aUm", "strowm"),  # codespell:ignore
    ("gently", "g'Vntli", "guntly"),  # codespell:ignore
    ("quick", "kw'u:k", "kwook"),  # codespell:ignore
    ("brown", "br'i:n", "breen"),  # codespell:ignore
    ("jumps", "j'i:mps", "yeemps"),  # codespell:ignore
    ("lazy", "l'OIzi", "loyzy"),  # codespell:ignore
    ("apple", "'u:p@l", "oople"),  # codespell:ignore
    ("doctor", "d'i:kt@", "deekter"),  # codespell:ignore
    ("mouse", "m'OIs", "moyse"),  # codespell:ignore
    ("clock", "kl'aIk", "clike"),  # codespell:ignore
)


def _whole_texts() -> Iterable[str]:
    for question in QUESTIONS:
        if question.whole:
            yield question.text
    yield from (request.text for request in REQUESTS)
    yield from SENTENCES
    for sentence, index, wrong in WRONG_SENTENCES:
        words = SENTENCES[sentence].split()
        yield " ".join([*words[:index], wrong, *words[index + 1 :]])
    yield from (command for command, _ in LONG_ANSWERS)
    yield from (command for command, _ in RUNNING_LISTS)
    yield from (*RANDOM_OPENINGS, *LIST_OPENINGS)


def _parts() -> Iterable[str]:
    for question in QUESTIONS:
        yield from question.parts
    for request in REQUESTS:
        yield from request.parts


# Texts needed as clips of their own: single words, and the short fixed calls.
WORDS: tuple[str, ...] = _distinct(
    [
        *(NUMBERS + DAYS + MONTHS + COLOURS + ANIMALS + OBJECTS + FILLERS),
        *(BACK_CHANNELS + STOP_COMMANDS + THANKS + CANCELS),
        *(word for sentence in SENTENCES for word in sentence.split()),
        *(wrong for _, _, wrong in WRONG_SENTENCES),
        *(part for part in _parts() if " " not in part),
    ]
)
PHRASES: tuple[str, ...] = _distinct(
    [
        *(part for part in _parts() if part not in WORDS),
        *(text for text in _whole_texts() if text not in WORDS),
    ]
)
