"""Tasks of conversation: questions, long answers, delegation, and sound that asks for nothing.

Owns when the model speaks, stops and waits in them. Events: ``answer`` (a question ended),
``pause`` (a hesitation inside one: silence), ``start`` and ``stop`` (of a long answer), ``ignore``
(a back-channel or noise during one: it goes on), ``delegate``, ``result``, ``revise``, ``cancel``,
``quiet`` (the end of something that needs no answer).
"""

from __future__ import annotations

from duplex_engine.training import phrases, sounds
from duplex_engine.training.stage import NOISE, TURN_S, TYPED, Said, Stage, turn_at
from duplex_engine.training.vocabulary import DELEGATE, DELEGATE_END, encode

__all__ = [
    "delegation_scene",
    "long_answer_scene",
    "question_scene",
    "quiet_scene",
    "typed_question",
]

SETTLE_S = 0.3  # silence after which the user is taken to have finished
RESULT_WORDS = phrases.RESULT_WORDS + phrases.NUMBERS + phrases.COLOURS


def _ask(stage: Stage, parts: tuple[str, ...], *, hesitant: bool) -> Said | None:
    """Says a question, perhaps with a hesitation inside; None if the voice lacks its texts."""
    whole = " ".join(parts)
    if stage.can_say(whole) and (not hesitant or not stage.can_say(*parts)):
        return stage.say(whole)
    if not stage.can_say(*parts):
        return None
    start_s = stage.time_s
    broken = int(stage.rng.integers(1, len(parts))) if hesitant else 0
    said = stage.say(parts[0])
    for number, part in enumerate(parts[1:], start=1):
        if number == broken:
            _hesitate(stage)
        else:
            stage.wait(0.0, 0.15)
        said = stage.say(part)
    return Said(start_s, said.end_s, said.words)


def _hesitate(stage: Stage) -> None:
    start_s = stage.time_s
    fillers = [filler for filler in phrases.FILLERS if stage.can_say(filler)]
    if fillers and stage.chance(0.4):
        stage.wait(0.05, 0.6)
        stage.say(stage.pick(fillers))
        stage.wait(0.1, 0.9)
    else:
        stage.wait(0.3, 1.6)
    n_turns = int((stage.time_s - start_s) / TURN_S)
    if n_turns > 0:
        stage.note("pause", start_s, window_turns=n_turns)


def _answered_question(stage: Stage) -> Said | None:
    question = stage.pick(phrases.QUESTIONS)
    said = _ask(stage, question.parts, hesitant=stage.chance(0.5))
    if said is not None:
        stage.react("answer", said.end_s, encode(" ".join(question.answer)))
    return said


def question_scene(stage: Stage) -> None:
    """A question, spoken or typed, is answered once, when it is finished."""
    if stage.chance(0.12):
        typed_question(stage)
    else:
        _answered_question(stage)
    stage.wait(0.8, 2.2)


def typed_question(stage: Stage) -> None:
    """A question is typed, and answered at once."""
    question = stage.pick(phrases.QUESTIONS)
    turn = stage.type(question.text)
    answer = encode(" ".join(question.answer))
    stage.emit("answer", turn * TURN_S, turn, answer, source=TYPED)


# --- long answers ------------------------------------------------------------------------------
def long_answer_scene(stage: Stage) -> None:
    """The model recites, a word a micro-turn; a stop ends it at once, a back-channel does not."""
    command, answer = stage.pick(phrases.LONG_ANSWERS)
    if stage.can_say(command) and stage.chance(0.9):
        source, begin_s = "", stage.say(command).end_s
        first = turn_at(begin_s)
    else:
        source, first = TYPED, stage.type(command)
        begin_s = first * TURN_S
    end = first + len(answer)
    stage.time_s = max(stage.time_s, (first + 1) * TURN_S)
    stage.wait(0.0, 0.8)
    while stage.time_s < end * TURN_S - 0.8 and stage.chance(0.55):
        _murmur(stage)
        stage.wait(0.3, 1.2)
    stopped = None
    if stage.time_s < end * TURN_S - 0.8 and stage.chance(0.75):
        stopped = _interrupt(stage, end)
    last = end if stopped is None else min(end, stopped)
    for turn, word in zip(range(first, last), answer, strict=False):
        assert turn not in stage.outputs
        stage.outputs[turn] = encode(word)
    stage.expect("start", begin_s, first, encode(answer[0]), source=source)
    stage.time_s = max(stage.time_s, last * TURN_S)
    stage.wait(1.0, 2.2)


def _murmur(stage: Stage) -> None:
    """Something that is no reason to stop."""
    sayable = [text for text in phrases.BACK_CHANNELS if stage.can_say(text)]
    if sayable and stage.chance(0.75):
        said = stage.say(stage.pick(sayable))
        stage.note("ignore", said.end_s, window_turns=2)
    else:
        stage.play_here(sounds.random_sound(stage.rng))
        stage.note("ignore", stage.time_s, window_turns=2, source=NOISE)


def _interrupt(stage: Stage, end: int) -> int | None:
    """The user cuts in; returns the first silent micro-turn."""
    questions = [
        question
        for question in phrases.QUESTIONS
        if question.text.startswith("what") and stage.can_say(question.text)
    ]
    if questions and stage.chance(0.3):
        question = stage.pick(questions)
        if not stage.has_word_times(question.text):
            return None
        said = stage.say(question.text)
        first_word_end_s = said.words[0][1]
        assert first_word_end_s is not None
        stopped = turn_at(first_word_end_s)
        if stopped < end:
            stage.expect("stop", first_word_end_s, stopped, ())
        stage.react("answer", said.end_s, encode(" ".join(question.answer)))
        return stopped
    commands = [text for text in phrases.STOP_COMMANDS if stage.can_say(text)]
    if not commands:
        return None
    said = stage.say(stage.pick(commands))
    stopped = turn_at(said.end_s)
    if stopped < end:
        stage.expect("stop", said.end_s, stopped, ())
    return stopped


# --- delegation --------------------------------------------------------------------------------
def delegation_scene(stage: Stage) -> None:
    """A question for the background model; its result is said when the user is silent."""
    request = stage.pick(phrases.REQUESTS)
    words = encode(" ".join(request.words))
    source = ""
    if stage.chance(0.12):
        source, turn = TYPED, stage.type(request.text)
        end_s = turn * TURN_S
    else:
        said = _ask(stage, request.parts, hesitant=stage.chance(0.3))
        if said is None:
            return
        end_s, turn = said.end_s, turn_at(said.end_s)
    handed = [DELEGATE, *words, DELEGATE_END]
    tokens = [*handed, *encode("one moment")]
    stage.emit("delegate", end_s, turn, tokens, window_turns=5, source=source)
    stage.time_s = max(stage.time_s, (turn + 2) * TURN_S)
    began_s = stage.time_s
    busy: list[Said] = []
    stage.wait(0.3, 2.5)
    for _ in range(int(stage.rng.integers(0, 3))):
        meanwhile = _answered_question(stage) if stage.chance(0.7) else _chatter(stage)
        if meanwhile is not None:
            busy.append(meanwhile)
        stage.wait(1.0, 2.0)
    if stage.chance(0.2) and _cancelled(stage):
        _deliver(stage, _random_result(stage), stage.time_s, [], kind=None)
        stage.wait(0.4, 1.0)
        return
    last_s = _deliver(stage, _random_result(stage), began_s, busy, kind="result")
    stage.time_s = max(stage.time_s, last_s)
    if stage.chance(0.35):
        stage.wait(0.4, 2.0)
        last_s = _deliver(stage, _random_result(stage), stage.time_s, [], kind="revise")
        stage.time_s = max(stage.time_s, last_s)
    stage.wait(0.8, 2.0)


def _random_result(stage: Stage) -> tuple[str, ...]:
    n_words = int(stage.rng.integers(1, 4))
    return tuple(stage.pick(RESULT_WORDS) for _ in range(n_words))


def _cancelled(stage: Stage) -> bool:
    sayable = [text for text in phrases.CANCELS if stage.can_say(text)]
    if not sayable:
        return False
    said = stage.say(stage.pick(sayable))
    stage.react("cancel", said.end_s, encode("okay"))
    stage.wait(0.6, 2.5)
    return True


def _deliver(
    stage: Stage, words: tuple[str, ...], from_s: float, busy: list[Said], *, kind: str | None
) -> float:
    """A result comes at some time from `from_s` on; returns when it has been said.

    kind: of the event; None where the user no longer wants it and the model keeps silent.
    """
    to_s = max(stage.time_s, from_s + 0.4)
    arrival = int(stage.rng.uniform(from_s, to_s) / TURN_S) + 1
    # Not in a micro-turn in which the user begins: there silence and speech cannot be told apart.
    while any(-0.1 < said.start_s - arrival * TURN_S < TURN_S + 0.1 for said in busy):
        arrival += 1
    stage.results[arrival] = encode(" ".join(words))
    turn = arrival
    for said in busy:
        settled = turn_at(said.end_s + SETTLE_S)
        if said.start_s < (arrival + 1) * TURN_S and turn < settled:
            turn = settled
    time_s = turn * TURN_S
    if kind is None:
        stage.note("quiet", time_s)
    else:
        spoken = ("sorry", *words) if kind == "revise" else words
        turn = stage.emit(kind, time_s, turn, encode(" ".join(spoken)))
    return (turn + 1) * TURN_S


# --- what asks for nothing ---------------------------------------------------------------------
def _chatter(stage: Stage) -> Said | None:
    sentences = stage.chatter()
    if not sentences:
        return None
    said = stage.say(stage.pick(sentences))
    stage.note("quiet", said.end_s)
    return said


def quiet_scene(stage: Stage) -> None:
    """Silence, noise, foreign or idle speech, back-channels to nobody: the model says nothing."""
    kind = int(stage.rng.integers(5))
    if kind == 0:
        stage.wait(1.0, 4.0)
        stage.note("quiet", stage.time_s)
    elif kind == 1:
        for _ in range(int(stage.rng.integers(1, 4))):
            stage.play_here(sounds.random_sound(stage.rng))
            stage.note("quiet", stage.time_s, source=NOISE)
            stage.wait(0.2, 1.0)
    elif kind == 2:
        if stage.play_other(stage.pick(("foreign", "speech", "music"))):
            stage.note("quiet", stage.time_s)
    elif kind == 3:
        for _ in range(int(stage.rng.integers(1, 3))):
            _chatter(stage)
            stage.wait(0.3, 0.9)
    else:
        murmurs = phrases.BACK_CHANNELS + phrases.FILLERS
        for text in stage.rng.permutation(murmurs)[: int(stage.rng.integers(1, 4))]:
            if stage.can_say(str(text)):
                said = stage.say(str(text))
                stage.note("quiet", said.end_s)
                stage.wait(0.3, 1.0)
    stage.wait(0.8, 2.0)
