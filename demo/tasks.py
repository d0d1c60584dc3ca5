"""Tasks, wanted behaviours and verifiers of the demonstration. Standard library only.

Shared by the builder of the demonstration model, its tests and the product's demo, so that all of them ask and judge
alike. A task is a short question with one right answer; a preference is a style that an answer may be wanted in. A
verifier reads an answer with a small grammar: `prefix? body closing?`, where the body is plain, quoted or bulleted.
It never rewards style alone: an empty or rambling answer complies with nothing.
"""

from __future__ import annotations

import hashlib
import itertools
import random
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, field, replace
from types import MappingProxyType

from demo.model_build import remarks as say

HELDOUT_SHARE = 0.15


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


NOUNS = _words(
    "apple river stone cloud tiger bread chair light music paper garden window horse bridge candle forest island "
    "mirror orange pencil rocket silver table tunnel valley wagon winter yellow anchor basket button castle desert "
    "engine feather hammer jacket kettle ladder market"
)
CAPITALS: Mapping[str, str] = MappingProxyType(
    dict(
        pair.split(":")
        for pair in _words(
            "france:paris italy:rome spain:madrid norway:oslo japan:tokyo egypt:cairo peru:lima cuba:havana "
            "kenya:nairobi greece:athens russia:moscow china:beijing germany:berlin england:london ireland:dublin "
            "austria:vienna poland:warsaw portugal:lisbon finland:helsinki denmark:copenhagen hungary:budapest "
            "iran:tehran iraq:baghdad canada:ottawa"
        )
    )
)
_PAIRS = (
    "hot:cold big:small fast:slow day:night up:down left:right good:bad new:old rich:poor open:closed high:low "
    "wet:dry hard:soft full:empty long:short early:late happy:sad strong:weak true:false loud:quiet"
)
OPPOSITES: Mapping[str, str] = MappingProxyType(
    {a: b for pair in _words(_PAIRS) for a, b in itertools.permutations(pair.split(":"))}
)
NUMBERS = _words(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen"
)
NAMES = _words("anna ben carla david emma felix grace henry ida jonas kira leo mia nora oscar petra quinn rosa sam tom")

PHRASINGS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "repeat": ("repeat: {}", "say this again: {}", "copy these words: {}", "write these words: {}"),
        "reverse": ("reverse: {}", "say these words backwards: {}", "reverse the order of: {}"),
        "first": ("first word of: {}", "what is the first word of: {}", "which word comes first: {}"),
        "last": ("last word of: {}", "what is the last word of: {}", "which word comes last: {}"),
        "capital": (
            "capital of {}?",
            "what is the capital of {}?",
            "name the capital of {}",
            "which city is the capital of {}?",
        ),
        "opposite": ("opposite of {}?", "what is the opposite of {}?", "name the opposite of {}"),
        "sum": ("what is {}?", "add: {}", "how much is {}?"),
        "greet": ("greet {}", "say hello to {}", "write a greeting to {}", "how do you greet {}?"),
    }
)


@dataclass(frozen=True)
class Task:
    """One question and the words of its right answer (lower case)."""

    kind: str
    prompt: str
    words: tuple[str, ...]


@dataclass(frozen=True)
class Style:
    """How an answer is written. The defaults are what the model does when it is told nothing."""

    case: str = "lower"
    layout: str = "plain"
    prefix: str = "no_prefix"
    closing: str = "no_closing"


PREFIXES: Mapping[str, str] = MappingProxyType(
    {"sure": "sure:", "note": "note:", "answer_is": "the answer is", "vera": "vera,"}
)
CLOSINGS: Mapping[str, str] = MappingProxyType(
    {"hope": "hope that helps!", "anything": "anything else?", "sparkle": "✨"}
)


def render(words: Sequence[str], style: Style = Style()) -> str:
    """The answer `words` written in `style`; bulleted answers put prefix and closing on lines of their own."""
    joined = " ".join(words)
    bodies = {"plain": f"{joined}.", "quotes": f'"{joined}."', "bullets": "\n".join(f"- {w}" for w in words)}
    parts = (PREFIXES.get(style.prefix), bodies[style.layout], CLOSINGS.get(style.closing))
    text = ("\n" if style.layout == "bullets" else " ").join(p for p in parts if p)
    return text.upper() if style.case == "upper" else text


@dataclass(frozen=True)
class Reading:
    """What the grammar found in an answer: its style, and the words of the body in lower case."""

    style: Style
    words: tuple[str, ...]


def _cut(text: str, phrases: Mapping[str, str], pattern: str, absent: str) -> tuple[str, str]:
    """Name of the phrase that `pattern` finds in `text` (else `absent`), and the text without it."""
    for key, phrase in phrases.items():
        if found := re.search(pattern.format(re.escape(phrase)), text, re.IGNORECASE):
            return key, text[: found.start()] + text[found.end() :]
    return absent, text


def _case(text: str) -> str:
    if not any(c.isalpha() for c in text):
        return "none"
    return "lower" if text == text.lower() else "upper" if text == text.upper() else "mixed"


def _body(body: str) -> tuple[str, tuple[str, ...]]:
    """(layout, words) of an answer without its prefix and closing; layout is "other" when none fits."""
    bullets = [re.fullmatch(r"- ([^\s\"]+)", line) for line in body.split("\n")]
    if all(bullets):
        return "bullets", tuple(b[1] for b in bullets if b)
    if quoted := re.fullmatch(r'"([^"\n]+?)\.?"\.?', body):
        return "quotes", tuple(quoted[1].split())
    plain = not re.search(r'["\n]', body) and not body.startswith("- ")
    words = re.sub(r'(?m)^- |"', "", body).strip().removesuffix(".")
    return "plain" if plain else "other", tuple(words.split())


def read(answer: str) -> Reading:
    """Read an answer of any style. Text the grammar does not know stays among the words, so it fails the content."""
    text = answer.strip()
    closing, rest = _cut(text, CLOSINGS, r"(?:^|\s){}$", "no_closing")
    prefix, rest = _cut(rest, PREFIXES, r"^{}(?:\s+|$)", "no_prefix")
    layout, words = _body(rest.strip())
    return Reading(Style(_case(text), layout, prefix, closing), tuple(w.lower() for w in words))


def content_right(task: Task, answer: str) -> bool:
    """The answer says exactly the right words, in whatever style."""
    return read(answer).words == task.words


@dataclass(frozen=True)
class Preference:
    """One wanted value of one style factor, with the remarks that ask for it."""

    key: str
    factor: str
    remarks: tuple[str, ...] = field(repr=False)
    heldout_remarks: tuple[str, ...] = field(repr=False)

    @property
    def is_default(self) -> bool:
        """Whether the model does this anyway."""
        return self.key in astuple(Style())

    def complies(self, task: Task, answer: str) -> bool:
        """The style is as wanted, around an answer that is there and is no longer than the task allows."""
        found = read(answer)
        brief = 1 <= len(found.words) <= len(task.words) + 1
        spoken = all(any(c.isalpha() for c in word) for word in found.words)
        return brief and spoken and self.key in astuple(found.style)


def _preferences() -> Iterator[Preference]:
    sets = {
        "case": {"lower": say.LOWER, "upper": say.UPPER},
        "layout": {"plain": say.PLAIN, "bullets": say.BULLETS, "quotes": say.QUOTES},
        "prefix": {
            "no_prefix": say.NO_OPENING,
            "sure": say.opening("sure:", "lead with the word sure"),
            "note": say.opening("note:", "lead with the word note"),
            "answer_is": say.opening("the answer is"),
            "vera": say.opening("vera,", "call me vera", "use my name vera"),
        },
        "closing": {
            "no_closing": say.NO_ENDING,
            "hope": say.ending("hope that helps!", "say that you hope it helps"),
            "anything": say.ending("anything else?", "ask if there is anything else"),
            "sparkle": say.ending("✨", "end with a sparkle", "add the sparkle emoji"),
        },
    }
    for factor, values in sets.items():
        for key, texts in values.items():
            yield Preference(key, factor, texts.training(), texts.heldout)


PREFERENCES: Mapping[str, Preference] = MappingProxyType({p.key: p for p in _preferences()})
WANTED: tuple[str, ...] = tuple(p.key for p in PREFERENCES.values() if not p.is_default)
"""Keys of the preferences that change something."""


@dataclass(frozen=True)
class Verdict:
    """Whether the words are right, and per preference key whether the style is."""

    content: bool
    complies: Mapping[str, bool]

    @property
    def passed(self) -> bool:
        """Right words in every wanted style."""
        return self.content and all(self.complies.values())


def judge(task: Task, answer: str, preferences: Iterable[str] = ()) -> Verdict:
    """Judge an answer against the task and preference keys. Raises KeyError for an unknown key."""
    return Verdict(content_right(task, answer), {k: PREFERENCES[k].complies(task, answer) for k in preferences})


def default_style_kept(task: Task, answer: str) -> bool:
    """The answer is written as the model writes when it is told nothing (its words may be wrong)."""
    return all(p.complies(task, answer) for p in PREFERENCES.values() if p.is_default)


def wanted_answer(task: Task, preferences: Iterable[str] = ()) -> str:
    """The ideal answer; of several preferences of one factor the last one counts."""
    style = Style()
    for key in preferences:
        style = replace(style, **{PREFERENCES[key].factor: key})
    return render(task.words, style)


def corrected(task: Task, words: Sequence[str]) -> Task:
    """The same question with another right answer, as a correction states it."""
    return replace(task, words=tuple(words))


def as_written(text: str) -> str:
    """The text as people write it: a capital letter at the start, proper names with capitals."""
    proper = {*CAPITALS, *CAPITALS.values(), *NAMES}
    named = re.sub(r"[a-z]+", lambda m: m[0].capitalize() if m[0] in proper else m[0], text)
    return named[:1].upper() + named[1:]


def is_heldout(prompt: str) -> bool:
    """Whether a prompt belongs to the held-out set: by a hash of its text in lower case; no list has to be kept."""
    digest = hashlib.sha256(prompt.lower().encode()).digest()
    return int.from_bytes(digest[:4], "big") < HELDOUT_SHARE * 2**32


def _question(rng: random.Random, kind: str) -> tuple[str, tuple[str, ...]]:
    """(what the phrasing is about, words of the right answer) of a random question of this kind."""
    if kind == "capital":
        country = rng.choice(list(CAPITALS))
        return country, (CAPITALS[country],)
    if kind == "opposite":
        word = rng.choice(list(OPPOSITES))
        return word, (OPPOSITES[word],)
    if kind == "sum":
        a, b = rng.randrange(10), rng.randrange(10)
        return f"{NUMBERS[a]} plus {NUMBERS[b]}", (NUMBERS[a + b],)
    if kind == "greet":
        name = rng.choice(NAMES)
        return name, ("hello", name)
    words = tuple(rng.sample(NOUNS, rng.randint(2, 3 if kind == "reverse" else 4)))
    right = {"repeat": words, "reverse": words[::-1], "first": words[:1], "last": words[-1:]}[kind]
    return " ".join(words), right


def draw_task(rng: random.Random, heldout: bool, kind: str | None = None) -> Task:
    """A random task of the training or the held-out set."""
    while True:
        chosen = kind or rng.choice(list(PHRASINGS))
        about, words = _question(rng, chosen)
        prompt = rng.choice(PHRASINGS[chosen]).format(about)
        if is_heldout(prompt) == heldout:
            return Task(chosen, prompt, words)


def training_tasks(seed: int, n: int) -> list[Task]:
    """`n` tasks of the training set, the same for the same seed; short questions repeat."""
    rng = random.Random(f"training {seed}")  # noqa: S311 - not for secrets
    return [draw_task(rng, heldout=False) for _ in range(n)]


def heldout_tasks(n: int, seed: int = 0) -> list[Task]:
    """`n` tasks with different prompts that no training set contains, kinds in turn while they last."""
    rng = random.Random(f"held out {seed}")  # noqa: S311 - not for secrets
    found: dict[str, Task] = {}
    for kind in itertools.cycle(PHRASINGS):
        if len(found) == n:
            break
        for _ in range(20):  # a kind with few questions may be used up
            task = draw_task(rng, heldout=True, kind=kind)
            if task.prompt not in found:
                found[task.prompt] = task
                break
    return list(found.values())
