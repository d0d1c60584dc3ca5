"""The words of the demonstration: what people say about an answer. Plain data, standard library only.

A remark is written as an instruction ("end with ...") that is put into several frames ("please ...", "next time ...")
or as a full sentence that stands alone. Held-out remarks are never shown in training.
"""

from __future__ import annotations

from dataclasses import dataclass

FRAMES = (
    "{}",
    "please {}",
    "{} please",
    "next time {}",
    "{} next time",
    "always {}",
    "{} from now on",
    "you should {}",
    "i would like you to {}",
    "i want you to {}",
    "can you {}?",
    "remember to {}",
    "do not forget to {}",
    "in every answer {}",
    "every time {}",
    "from now on {}",
)


@dataclass(frozen=True)
class RemarkSet:
    """Ways to ask for one thing: `instructions` take every frame, `sentences` stand alone."""

    instructions: tuple[str, ...]
    sentences: tuple[str, ...]
    heldout: tuple[str, ...]

    def training(self) -> tuple[str, ...]:
        """Every remark of the training set, without repeats, in a fixed order."""
        framed = (frame.format(text) for text in self.instructions for frame in FRAMES)
        return tuple(dict.fromkeys([*framed, *self.sentences]))


def opening(phrase: str, *more: str) -> RemarkSet:
    """Ways to ask that the answer opens with `phrase`; `more` are instructions of its own."""
    p = phrase
    return RemarkSet(
        instructions=(
            f"start with {p}",
            f"begin with {p}",
            f"open with {p}",
            f'start with "{p}"',
            f'begin your answer with "{p}"',
            f"say {p} first",
            f"put {p} before the answer",
            f"write {p} in front of the answer",
            f"start your answers with {p}",
            f"let every answer start with {p}",
            *more,
        ),
        sentences=(
            f"{p} comes first",
            f"i want to see {p} first",
            f"the answer should start with {p}",
            f"{p} is missing at the start",
            f'the first words should be "{p}"',
            f"every answer should open with {p}",
            f"your answers should begin with {p}",
            f"you should have said {p} first",
            f"you should have started with {p}",
            f"answers must start with {p}",
        ),
        heldout=(
            f"every answer should begin with {p}",
            f'i want you to start your answer with "{p}"',
            f"you should have put {p} first",
        ),
    )


def ending(phrase: str, *more: str) -> RemarkSet:
    """Ways to ask that the answer ends with `phrase`; `more` are instructions of its own."""
    p = phrase
    return RemarkSet(
        instructions=(
            f"end with {p}",
            f"close with {p}",
            f"finish with {p}",
            f'end with "{p}"',
            f'finish your answer with "{p}"',
            f"say {p} at the end",
            f"add {p} after the answer",
            f"put {p} at the end of the answer",
            f"end your answers with {p}",
            f"let every answer end with {p}",
            *more,
        ),
        sentences=(
            f"{p} comes last",
            f"i want to see {p} at the end",
            f"the answer should end with {p}",
            f"{p} is missing at the end",
            f'the last words should be "{p}"',
            f"every answer should close with {p}",
            f"your answers should end with {p}",
            f"you should have said {p} at the end",
            f"you should have ended with {p}",
            f"answers must end with {p}",
        ),
        heldout=(
            f"every answer should finish with {p}",
            f'i want you to close your answer with "{p}"',
            f"you should have added {p} at the end",
        ),
    )


UPPER = RemarkSet(
    instructions=(
        "use upper case",
        "write in upper case",
        "write everything in capitals",
        "answer in capital letters",
        "use capital letters only",
        "put it in all caps",
        "shout the answer",
        "make every letter a capital",
        "use big letters",
    ),
    sentences=(
        "all caps",
        "upper case only",
        "i can only read capitals",
        "capital letters are better",
        "this should be in upper case",
        "i want big letters",
        "capitals are missing",
        "every answer should be in capitals",
        "you should have used capitals",
    ),
    heldout=(
        "put the answer in upper case",
        "i would like to read all caps",
        "the whole answer in capital letters",
    ),
)
LOWER = RemarkSet(
    instructions=(
        "use lower case",
        "write in lower case",
        "keep everything in lower case",
        "answer in small letters",
        "use small letters only",
        "write without capitals",
        "avoid capital letters",
        "use no capitals",
        "leave out the capital letters",
        "stop shouting",
    ),
    sentences=(
        "no capitals",
        "lower case only",
        "small letters are enough",
        "no caps",
        "capital letters are not needed",
        "every letter should be small",
        "i do not want capital letters",
        "there should be no big letters",
    ),
    heldout=("put the answer in lower case", "i want small letters", "no capital letters"),
)
BULLETS = RemarkSet(
    instructions=(
        "use bullet points",
        "write a bullet list",
        "put every word in its own bullet",
        "answer as a list",
        "use a list with dashes",
        "make it a bullet list",
        "start each line with a dash",
        "give me a list of bullets",
        "write the answer as bullets",
    ),
    sentences=(
        "bullet points",
        "a list is easier to read",
        "i like bullets",
        "this should be a list",
        "bullets are missing",
        "i want one dash for each word",
        "every answer should be a list",
        "you should have used bullets",
    ),
    heldout=(
        "write it as bullet points",
        "the answer should be a bullet list",
        "i want a list with dashes",
    ),
)
QUOTES = RemarkSet(
    instructions=(
        "use quotation marks",
        "put the answer in quotes",
        "quote the answer",
        "put quotes around it",
        "put it in quotation marks",
        "add quote marks",
        "write it between quotes",
        "set the answer in quotation marks",
        "answer in quotes",
    ),
    sentences=(
        "in quotes",
        "quotes are missing",
        "i like quotes",
        "the answer needs quotation marks",
        "i want quotes around it",
        "this should be in quotes",
        "every answer should be in quotes",
        "you should have used quotes",
    ),
    heldout=(
        "put quotation marks around the answer",
        "i want to see the answer in quotes",
        "the answer should be between quotation marks",
    ),
)
PLAIN = RemarkSet(
    instructions=(
        "use plain text",
        "write it on one line",
        "drop the list",
        "drop the quotes",
        "keep the text plain",
        "write without bullets",
        "leave out the quotation marks",
        "use no special layout",
    ),
    sentences=(
        "plain text only",
        "no bullets and no quotes",
        "a simple line is enough",
        "no list",
        "every answer should be plain text",
        "i do not want a list or quotes",
    ),
    heldout=("i want plain text", "leave out the bullets", "no quotation marks and no list"),
)
NO_OPENING = RemarkSet(
    instructions=(
        "start with the answer",
        "begin directly with the answer",
        "leave out the opening words",
        "drop the introduction",
        "skip the introduction",
        "say nothing before the answer",
        "answer without an opening",
    ),
    sentences=(
        "no introduction",
        "no opening words",
        "nothing before the answer",
        "the introduction is not needed",
        "every answer should start directly",
        "i do not want an introduction",
    ),
    heldout=("start directly with the answer", "leave out the introduction", "no words before the answer"),
)
NO_ENDING = RemarkSet(
    instructions=(
        "stop after the answer",
        "leave out the closing words",
        "end with the answer",
        "drop the closing",
        "say nothing after the answer",
        "skip the closing words",
        "answer without a closing",
    ),
    sentences=(
        "no closing words",
        "no closing",
        "nothing after the answer",
        "the closing is not needed",
        "every answer should stop there",
        "i do not want a closing",
    ),
    heldout=("stop directly after the answer", "leave out the closing", "no words after the answer"),
)

PRAISE = (
    "great answer",
    "perfect",
    "thank you",
    "thanks",
    "well done",
    "that is right",
    "good job",
    "i like it",
    "exactly what i wanted",
    "very nice",
    "this is good",
    "great, thank you",
    "you got it right",
    "i am happy with this answer",
)
HELDOUT_PRAISE = ("this is a great answer", "perfect, thank you", "very good job")
CONTENTLESS = ("ok", "hm", "i see", "noted", "fine", "i read it", "no comment", "all right", "...", "ok, i see")
CORRECTIONS = (
    "the right answer is {}",
    "the correct answer is {}",
    "it should be {}",
    "wrong, it is {}",
    "no, the right answer is {}",
    "this is wrong, it should be {}",
    "you should have said {}",
)
HELDOUT_CORRECTIONS = ("wrong, the right answer is {}", "no, it should be {}")
