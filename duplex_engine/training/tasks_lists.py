"""Tasks in which the user says words one after the other: lists, sentences, running lists.

Owns what is right and wrong in them. Events: ``correct`` and ``pronounce`` (a mistake is
corrected), ``right`` (a right item: silence), ``echo`` (a word of the asked class is repeated),
``pass`` (another word: silence).
"""

from __future__ import annotations

from dataclasses import dataclass

from duplex_engine.training import phrases
from duplex_engine.training.stage import Stage
from duplex_engine.training.vocabulary import encode

__all__ = [
    "ListFollower",
    "drill_scene",
    "list_scene",
    "running_scene",
    "sentence_scene",
    "unordered_scene",
]

CAUGHT_TURNS = 2  # micro-turns in which a correction is still one
CONTEXT_S = (1.6, 2.6)  # silence after which a list is over
DRILL_PAUSE_S = (0.8, 1.6)
# items, cyclic, may be recited backwards; numbers twice as often as the others
LISTS = (
    (phrases.NUMBERS, False, True),
    (phrases.NUMBERS, False, True),
    (phrases.DAYS, True, False),
    (phrases.MONTHS, True, False),
)


@dataclass
class ListFollower:
    """Follows a list as the model should: says which item would have been right.

    Attributes:
        items: the list in order.
        cyclic: whether the first item follows the last one.
        may_fall: whether it may be recited backwards; the second item decides.
    """

    items: tuple[str, ...]
    cyclic: bool
    may_fall: bool

    def __post_init__(self) -> None:
        self.recovering = False  # the last item was wrong
        self._step = 0  # 0: not yet known
        self._expected: int | None = None
        self._accepted: set[int] = set()

    def _at(self, index: int) -> int | None:
        if self.cyclic:
            return index % len(self.items)
        return index if 0 <= index < len(self.items) else None

    def _accept(self, indices: set[int]) -> None:
        self._accepted = {at for index in indices if (at := self._at(index)) is not None}

    @property
    def expected(self) -> str | None:
        """The right next item; None at the list's end or before its first item."""
        return None if self._expected is None else self.items[self._expected]

    @property
    def accepted(self) -> set[str]:
        """All items that would not be called wrong now."""
        return {self.items[index] for index in self._accepted}

    def hear(self, item: str) -> str | None:
        """Takes the next item; returns the right one if this one was wrong, else None.

        After a mistake the list may go on from the wrong or the right item, or repeat the latter.
        """
        index = self.items.index(item) if item in self.items else None
        if self._expected is None:
            assert index is not None
            self._expected = self._at(index + 1)
            self._accept({index + 1} | ({index - 1} if self.may_fall else set()))
            return None
        right = self._expected
        self.recovering = index not in self._accepted
        if index is not None and not self.recovering:
            if self._step == 0:
                self._step = 1 if index == right else -1
            self._expected = self._at(index + self._step)
            self._accept({index + self._step})
            return None
        self._step = self._step or 1
        self._expected = self._at(right + self._step)
        self._accept(
            {right, right + self._step} | (set() if index is None else {index + self._step})
        )
        return self.items[right]


def _wrong_item(stage: Stage, follower: ListFollower, last: str) -> str:
    """An item that the list may not go on with: often a near one, sometimes of another class."""
    items = follower.items
    here = items.index(last) if last in items else 0
    if stage.chance(0.4):
        near = items[max(here - 3, 0) : here + 4]
    elif stage.chance(0.1):
        near = tuple(w for w in phrases.OBJECTS + phrases.COLOURS if stage.can_say(w))
    else:
        near = items
    wrong = [item for item in near or items if item not in follower.accepted]
    return stage.pick(wrong or [item for item in items if item not in follower.accepted])


def _say_or_type(stage: Stage, text: str) -> None:
    if stage.can_say(text) and stage.chance(0.85):
        stage.say(text)
    else:
        stage.type(text)


def list_scene(stage: Stage) -> None:
    """The user counts, or recites days or months; wrong items are corrected at once."""
    known = [entry for entry in LISTS if stage.can_say(*entry[0])]
    if not known:
        return
    items, cyclic, may_fall = stage.pick(known)
    if stage.chance(0.35):
        opening = stage.pick(phrases.LIST_OPENINGS)
        if stage.can_say(opening):
            stage.say(opening)
            stage.wait(0.3, 0.8)
    follower = ListFollower(items, cyclic, may_fall)
    p_wrong = float(stage.rng.uniform(0.15, 0.5)) if stage.chance(0.7) else 0.0
    p_slurred = 0.3 if stage.chance(0.3) else 0.0
    falls = may_fall and stage.chance(0.25)
    gap_s = float(stage.rng.uniform(0.05, 0.8))
    item = _first_item(stage, items, falls)
    said = stage.say(item)
    follower.hear(item)
    stage.expect_word(follower.expected, said.end_s)
    for position in range(1, int(stage.rng.integers(3, 12))):
        stage.wait(0.7 * gap_s, 1.3 * gap_s)
        previous = item
        right = follower.expected
        if position == 1 and falls:
            right = items[items.index(item) - 1]
        if right is None:
            break
        if stage.chance(p_wrong):
            item = _wrong_item(stage, follower, previous)
        else:
            item = _next_right(stage, follower, right)
        slurred = item in follower.accepted and stage.chance(p_slurred)
        _say_item(stage, follower, item, slurred=slurred and stage.can_mispronounce(item))
    stage.wait(*CONTEXT_S)


def _first_item(stage: Stage, items: tuple[str, ...], falls: bool) -> str:
    if falls:
        return items[int(stage.rng.integers(5, len(items) - 1))]
    if stage.chance(0.5):
        return items[0]
    return items[int(stage.rng.integers(len(items) - 2))]


def _next_right(stage: Stage, follower: ListFollower, right: str) -> str:
    """Mostly the expected item; after a mistake sometimes another accepted way to go on."""
    others = sorted(follower.accepted - {right})
    if others and follower.recovering and stage.chance(0.6):
        return stage.pick(others)
    return right


def _say_item(stage: Stage, follower: ListFollower, item: str, *, slurred: bool) -> None:
    said = stage.say(item, wrongly=slurred)
    right = follower.hear(item)
    stage.expect_word(follower.expected, said.end_s)
    if right is not None:
        stage.react("correct", said.end_s, encode(f"no {right}"), window_turns=CAUGHT_TURNS)
    elif slurred:
        stage.react("pronounce", said.end_s, encode(f"say {item}"), window_turns=CAUGHT_TURNS)
    else:
        stage.note("right", said.end_s, window_turns=2)


def sentence_scene(stage: Stage) -> None:
    """The user says a sentence known by heart; a wrong or slurred word is corrected at once."""
    number = int(stage.rng.integers(len(phrases.SENTENCES)))
    text = phrases.SENTENCES[number]
    if stage.chance(0.5):
        _whole_sentence(stage, number)
    elif stage.can_say(*text.split()):
        _word_by_word(stage, text)
    stage.wait(*CONTEXT_S)


def _whole_sentence(stage: Stage, number: int) -> None:
    """In one breath; needs a voice whose words have times."""
    right = phrases.SENTENCES[number].split()
    spoken = right
    if stage.chance(0.6):
        variants = [(i, word) for s, i, word in phrases.WRONG_SENTENCES if s == number]
        index, word = stage.pick(variants)
        spoken = [*right[:index], word, *right[index + 1 :]]
    if not stage.can_say(" ".join(spoken)) or not stage.has_word_times(" ".join(spoken)):
        return
    said = stage.say(" ".join(spoken))
    for index, (expected, (word, end_s)) in enumerate(zip(right, said.words, strict=True)):
        assert end_s is not None
        stage.expect_word(next(iter(right[index + 1 :]), None), end_s)
        if word != expected:
            stage.react("correct", end_s, encode(f"no {expected}"), window_turns=CAUGHT_TURNS)
        else:
            stage.note("right", end_s, window_turns=2)


def _word_by_word(stage: Stage, text: str) -> None:
    p_wrong = float(stage.rng.uniform(0.1, 0.35)) if stage.chance(0.5) else 0.0
    p_slurred = float(stage.rng.uniform(0.2, 0.8)) if stage.chance(0.6) else 0.0
    gap_s = float(stage.rng.uniform(0.01, 0.35))
    sentence_words = {word for sentence in phrases.SENTENCES for word in sentence.split()}
    others = [w for w in sentence_words | set(phrases.OBJECTS) if stage.can_say(w)]
    others.sort()
    first_certain = 2 if text.startswith("the ") else 1  # until then it may be any sentence
    words = text.split()
    for index, word in enumerate(words):
        if index >= first_certain and stage.chance(p_wrong):
            said = stage.say(stage.pick([other for other in others if other != word]))
            stage.react("correct", said.end_s, encode(f"no {word}"), window_turns=CAUGHT_TURNS)
        elif stage.chance(p_slurred) and stage.can_mispronounce(word):
            said = stage.say(word, wrongly=True)
            stage.react("pronounce", said.end_s, encode(f"say {word}"), window_turns=CAUGHT_TURNS)
        else:
            said = stage.say(word)
            stage.note("right", said.end_s, window_turns=2)
        if index + 1 >= first_certain:
            stage.expect_word(next(iter(words[index + 1 :]), None), said.end_s)
        stage.wait(0.5 * gap_s, 1.5 * gap_s)


def unordered_scene(stage: Stage) -> None:
    """Words in no order, announced as such (or of no list at all): nothing is wrong."""
    pool = phrases.OBJECTS + phrases.ANIMALS + phrases.COLOURS
    if stage.chance(0.7):
        _say_or_type(stage, stage.pick(phrases.RANDOM_OPENINGS))
        stage.wait(0.2, 0.7)
        pool = stage.pick((phrases.NUMBERS, phrases.NUMBERS[:9], phrases.DAYS, phrases.MONTHS))
    words = [word for word in pool if stage.can_say(word)]
    gap_s = float(stage.rng.uniform(0.05, 0.7))
    _say_in_no_order(stage, words, (3, 10), (0.7 * gap_s, 1.3 * gap_s))
    stage.wait(*CONTEXT_S)


def _say_in_no_order(
    stage: Stage, words: list[str], n_words: tuple[int, int], gap_s: tuple[float, float]
) -> None:
    for _ in range(int(stage.rng.integers(*n_words)) if words else 0):
        said = stage.say(stage.pick(words))
        stage.note("pass", said.end_s, window_turns=2)
        stage.wait(*gap_s)


def drill_scene(stage: Stage) -> None:
    """Any words in no order, one soon after the other: nothing is wrong, nothing can be foreseen.

    For training only. In a sentence or a list the next word can be guessed, and a guess is no
    hearing: just the wrong words would not be heard.
    """
    words = [word for word in phrases.WORDS if stage.can_say(word)]
    if stage.chance(0.5):
        _say_or_type(stage, stage.pick(phrases.RANDOM_OPENINGS))
        stage.wait(0.2, 0.6)
    else:
        listed = {*phrases.NUMBERS, *phrases.DAYS, *phrases.MONTHS}
        words = [word for word in words if word not in listed]
    gap_s = float(stage.rng.uniform(0.01, 0.35))
    _say_in_no_order(stage, words, (6, 16), (0.5 * gap_s, 1.5 * gap_s))
    stage.wait(*DRILL_PAUSE_S)


def running_scene(stage: Stage) -> None:
    """After a command, every word of the class asked for is repeated, until a "thank you"."""
    command, wanted = stage.pick(phrases.RUNNING_LISTS)
    if not any(stage.can_say(word) for word in wanted):
        return
    _say_or_type(stage, command)
    stage.wait(0.4, 1.2)
    everything = phrases.COLOURS + phrases.NUMBERS + phrases.ANIMALS + phrases.OBJECTS
    own = [word for word in wanted if stage.can_say(word)]
    others = [w for w in (*everything, *phrases.FILLERS) if w not in wanted and stage.can_say(w)]
    gap_s = float(stage.rng.uniform(0.08, 0.8))
    for _ in range(int(stage.rng.integers(4, 13))):
        said = stage.say(stage.pick(own if stage.chance(0.5) or not others else others))
        word = said.words[-1][0]
        if word in wanted:
            stage.react("echo", said.end_s, encode(word), window_turns=3)
        else:
            stage.note("pass", said.end_s, window_turns=2)
        stage.wait(0.6 * gap_s, 1.4 * gap_s)
    _say_or_type(stage, stage.pick(phrases.THANKS))
    # note: loose numbers would be a list with mistakes, and so no silence.
    after = [word for word in own if word not in phrases.NUMBERS] or others
    for _ in range(int(stage.rng.integers(0, 4)) if after else 0):
        stage.wait(0.2, 0.8)
        said = stage.say(stage.pick(after))
        stage.note("pass", said.end_s, window_turns=2)
    stage.wait(*CONTEXT_S)
