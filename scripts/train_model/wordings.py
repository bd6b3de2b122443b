"""`MANY`, `MORE`, `MOST`, `ALL`: wordings put together from parts, for later stages of training.

A model that has met ten ways to ask learns those ten and answers "I see." to an eleventh. What it
must learn is what makes a question: a verb of asking and a known noun. So requests are products of
openings, verbs, objects and endings. None of them is a held-out wording, although their words are
the same ones.
"""

from collections.abc import Iterable
from dataclasses import fields, replace
from itertools import product

from .phrases import FEW, HELD_OUT, FactKind

_VERBS = (
    "tell me",
    "give me",
    "say",
    "show me",
    "name",
    "find",
    "repeat",
    "recall",
    "search for",
    "look for",
    "report",
    "let me know",
    "read out",
    "write down",
)
_ASKING = ("{}", "Please {}", "Now {}", "Can you {}", "Could you {}", "Will you please {}")
_WISHES = ("I need {}", "I want to know {}", "I forgot {}", "Do you know {}", "Do you remember {}")
_CLAIMS = (
    "{}",
    "Note that {}",
    "Remember that {}",
    "He said that {}",
    "She told them that {}",
    "They say that {}",
    "It is true that {}",
    "I have heard that {}",
    "Somebody wrote that {}",
    "Do not forget that {}",
)


def _sentence(text: str) -> str:
    """With a capital letter and, where none stands yet, a full stop or a question mark."""
    text = text[0].upper() + text[1:] if text[0] != "{" else text
    if text[-1] in ".?!":
        return text
    asks = text.startswith(("Can ", "Could ", "Will ", "Do ", "Did ", "What ", "Which ", "Where "))
    return text + ("?" if asks and not text.startswith("Do not") else ".")


def _plain(text: str) -> str:
    return text.strip(" .?!,").lower()


def _held_out(value: object) -> Iterable[str]:
    if isinstance(value, str):
        yield _plain(value)
    elif isinstance(value, tuple):
        for part in value:
            yield from _held_out(part)
    elif isinstance(value, FactKind):
        yield from _held_out((value.statements, value.questions))


_KEPT_BACK = {
    text for field in fields(HELD_OUT) for text in _held_out(getattr(HELD_OUT, field.name))
}


def _all(*groups: Iterable[str], space: str = "") -> tuple[str, ...]:
    """The sentences of all groups without repeats and without the held-out ones."""
    made = dict.fromkeys(space + _sentence(text.strip()) for group in groups for text in group)
    return tuple(text for text in made if _plain(text) not in _KEPT_BACK)


def _requests(objects: Iterable[str], endings: Iterable[str] = ("",)) -> Iterable[str]:
    """Every way to ask for every object, with every ending."""
    objects, endings = tuple(objects), tuple(endings)
    for frame, verb, thing, ending in product(_ASKING, _VERBS, objects, endings):
        yield frame.format(f"{verb} {thing}{ending}")
    for wish, thing, ending in product(_WISHES, objects, endings):
        yield wish.format(f"{thing}{ending}")
    for thing in objects:
        yield f"{thing}, please"


def _claims(cores: Iterable[str]) -> Iterable[str]:
    return (claim.format(core) for core, claim in product(cores, _CLAIMS))


_OF_KEY = ("the {n} of {k}", "the {n} for {k}", "the {n} that {k} has", "the {n} given to {k}")
_ALL_OF_KEY = ("all the {n}s of {k}", "all {n}s for {k}", "every {n} of {k}", "the {n}s of {k}")
_WHERE = ("", " in the text", " mentioned in the text", " again")
_ADJECTIVES = (
    "magic",
    "secret",
    "lucky",
    "special",
    "last",
    "first",
    "new",
    "old",
    "private",
    "true",
    "golden",
    "common",
    "good",
    "lost",
)


def _fact(kind: FactKind, claims: tuple[str, ...], objects: tuple[str, ...]) -> FactKind:
    """The kind with `claims` and `objects` in all wordings added to its own ones."""
    return replace(
        kind,
        statements=_all(kind.statements, _claims(claims)),
        questions=_all(kind.questions, _requests(objects)),
    )


MANY = replace(
    FEW,
    number_nouns=(
        *FEW.number_nouns,
        *(f"{a} {n}" for a, n in product(_ADJECTIVES, ("number", "code", "price", "figure"))),
    ),
    word_nouns=(
        *FEW.word_nouns,
        *(f"{a} {n}" for a, n in product(_ADJECTIVES, ("word", "name", "thing", "title"))),
    ),
    needles=_all(
        FEW.needles,
        _claims(
            (
                "the {n} for {k} is {v}",
                "the {n} of {k} is {v}",
                "the {n} of {k} was {v}",
                "{k} has the {n} {v}",
                "{k} was given the {n} {v}",
                "{v} is the {n} of {k}",
                "the {n} that {k} has is {v}",
                "there is a {n} for {k}, namely {v}",
                "one of the {n}s for {k} is {v}",
            )
        ),
        space=" ",
    ),
    questions=_all(
        FEW.questions,
        _requests((*_OF_KEY, "which {n} {k} has", "what the {n} of {k} is"), _WHERE),
        ("What {n} was mentioned for {k}?", "{k} has which {n}?", "What is the {n} of {k} again?"),
        space=" ",
    ),
    all_values=_all(
        FEW.all_values,
        _requests((*_ALL_OF_KEY, "which {n}s {k} has"), _WHERE),
        ("{k} has which {n}s?", "Which {n}s were mentioned for {k}?", "What are all {n}s of {k}?"),
        space=" ",
    ),
    several_keys=_all(
        FEW.several_keys, _requests(("the {n}s of {k}", "the {n}s for {k}"), _WHERE), space=" "
    ),
    assignments=_all(
        FEW.assignments,
        (
            f"{before}{core}"
            for before, core in product(
                ("", "We write ", "Then ", "Write ", "After that, ", "So "),
                ("{x} = {y}", "{x} is {y}", "{x} equals {y}", "{x} gets {y}"),
            )
        ),
        ("Take {x} as {y}.", "Give {x} the value {y}.", "Assign {y} to {x}."),
        space=" ",
    ),
    variable_value=_all(
        FEW.variable_value,
        _requests(("the value of {x}", "which value {x} has", "what {x} is"), ("", " in the end")),
        ("What is {x}?", "{x} has which value?", "What is the final value of {x}?"),
        space=" ",
    ),
    variable_names=_all(
        FEW.variable_names,
        _requests(
            ("all variables with the value {v}", "every variable that is {v}"), ("", " in the text")
        ),
        ("Which variables are {v}?", "Which variables have {v} as their value?"),
        space=" ",
    ),
    # How a pair is written carries no full stop of its own beyond the one at the end.
    pairs=tuple(
        f" {{k}}{mark}{{v}}."
        for mark in (
            *(": ", " is ", " = ", " - ", " has ", " -> ", " gets ", " / ", " with ", " means "),
            *(" and ", " ", " + ", " | ", " => ", " was ", " equals ", " goes with ", " : "),
        )
    ),
    list_openings=(
        *FEW.list_openings,
        " The list follows.",
        " Read these pairs.",
        " Here are some entries.",
        " Keep this table in mind.",
    ),
    list_questions=_all(
        FEW.list_questions,
        _requests(
            (
                "{k}",
                "the entry of {k}",
                "what is next to {k}",
                "what belongs to {k}",
                "the value for {k}",
            ),
            ("", " from the list"),
        ),
        ("{k}?", "Which one is with {k}?", "What did the list say about {k}?", "Look {k} up."),
        space=" ",
    ),
    facts=(
        _fact(
            FEW.facts[0],
            (
                "my {r} is called {v}",
                "our {r} is called {v}",
                "{v} is the name of my {r}",
                "I call my {r} {v}",
                "people call my {r} {v}",
            ),
            ("the name of my {r}", "what my {r} is called", "how my {r} is called"),
        ),
        _fact(
            FEW.facts[1],
            (
                "my favourite {r} is {v}",
                "the {r} I like best is {v}",
                "no {r} is better than {v}",
                "{v} is the best {r} for me",
                "I always liked {v} as a {r}",
            ),
            ("my favourite {r}", "which {r} I like best", "the {r} that I prefer"),
        ),
        _fact(
            FEW.facts[2],
            (
                "the code of my {r} is {v}",
                "you can open my {r} with {v}",
                "{v} is the code of my {r}",
                "my {r} has the code {v}",
            ),
            ("the code of my {r}", "which code my {r} has", "the code for my {r}"),
        ),
        _fact(
            FEW.facts[3],
            ("my {r} lives in {v}", "the home of my {r} is in {v}", "my {r} has moved to {v}"),
            ("where my {r} lives", "the place where my {r} lives"),
        ),
    ),
    acknowledgements=(*FEW.acknowledgements, "I will remember that.", "Thank you.", "Understood."),
    copy_requests=(*FEW.copy_requests, "Now repeat this:", "Copy this:", "Say it once more:"),
    prose_requests=(
        *FEW.prose_requests,
        "Please go on.",
        "Tell me more.",
        "Can you tell me a story?",
        "What happened next?",
        "Read me a page.",
    ),
)

# Still more for the longer stages, where there is time for them: values that come before what they
# belong to, sentences that go on after the value, pairs written as phrases.
_ENDINGS = ("", "", ", I think", ", you know", ", of course", ", as they say", " these days")


def _said(cores: Iterable[str]) -> Iterable[str]:
    return (f"{claim}{ending}" for claim in _claims(cores) for ending in _ENDINGS)


def _more(kind: FactKind, *cores: str) -> FactKind:
    return replace(kind, statements=_all(kind.statements, _said(cores)))


MORE = replace(
    MANY,
    needles=_all(
        MANY.needles,
        _said(
            (
                "the {n} to be used for {k} is {v}",
                "{k} goes with the {n} {v}",
                "for {k} they wrote down the {n} {v}",
                "the {n} {v} is that of {k}",
                "{k} can be found under the {n} {v}",
                "as {n} of {k} we have {v}",
                "{v} is what they gave as the {n} of {k}",
                "nothing but {v} is the {n} of {k}",
            )
        ),
        space=" ",
    ),
    pairs=(
        *MANY.pairs,
        " {k}, {v}.",
        " {k}; {v}.",
        " {k} ({v}).",
        *(
            f" {{k}} {phrase} {{v}}."
            for phrase in (
                *("stands for", "belongs to", "comes with", "next to", "beside", "leads to"),
                *("together with", "points to", "is paired with", "then", "gives", "holds"),
                *("stands beside", "wants", "takes", "--", "..", "is written with"),
            )
        ),
    ),
    facts=(
        _more(
            MANY.facts[0],
            "my {r} goes by the name of {v}",
            "my {r} answers to {v}",
            "{v} is my {r}",
            "this is {v}, my {r}",
            "they gave my {r} the name {v}",
            "we chose the name {v} for my {r}",
            "I named our {r} {v}",
            "everybody knows my {r} as {v}",
            "I say {v} to my {r}",
            "my {r} has the name {v}",
            "we call our {r} {v}",
        ),
        _more(
            MANY.facts[1],
            "the best {r} is {v}",
            "the finest {r} there is must be {v}",
            "{v} is the {r} that I choose",
            "as a {r} I choose {v}",
            "I would take {v} as my {r} any day",
            "there is no {r} like {v}",
            "{v} makes the best {r}",
            "I love {v} as my {r}",
            "if I need a {r}, I take {v}",
            "{v} will always be my {r}",
        ),
        _more(
            MANY.facts[2],
            "my {r} needs {v} as its code",
            "with {v} you get into my {r}",
            "the code {v} opens my {r}",
            "my {r} opens with {v}",
            "I set the code of my {r} to {v}",
            "use {v} for my {r}",
            "the number {v} is for my {r}",
            "you have to enter {v} at my {r}",
            "for my {r} the code is {v}",
        ),
        _more(
            MANY.facts[3],
            "you find my {r} in {v}",
            "{v} is where my {r} lives",
            "my {r} settled in {v}",
            "my {r} now stays in {v}",
        ),
    ),
)

# And for the longest ones: many ways to ask for an entry of a list.
MOST = replace(
    MORE,
    list_questions=_all(
        MORE.list_questions,
        _requests(
            ("{k}", "what goes with {k}", "the word or number of {k}", "what {k} has"),
            (" in the list", " on the list", " for me", " once more"),
        ),
        (
            f"{asked} {{k}}{ending}?"
            for asked in (
                *("What goes along with", "What comes with", "What is paired with", "What fits"),
                *("What matches", "What follows", "What stands beside", "What is written beside"),
                *("What is noted for", "What was given for", "What do you see beside"),
                *(
                    "What do you find at",
                    "What is there for",
                    "What is linked to",
                    "What is tied to",
                ),
                *("Which one goes with", "Which value goes with"),
                "Which word or number is for",
            )
            for ending in ("", " in the list", " on this list")
        ),
        space=" ",
    ),
)

# And at the very end: words between what is said and what it is said of, which change nothing.
_AMONG = ("in the world", "that I know", "for me", "by far", "of the lot", "anywhere", "on earth")

ALL = replace(
    MOST,
    facts=(
        _more(
            MOST.facts[0],
            *(f"{verb} my {{r}} {{v}}" for verb in ("we called", "they named", "I have named")),
            "my {r} was given the name {v}",
            "whoever sees my {r} says {v}",
        ),
        _more(
            MOST.facts[1],
            *(f"the best {{r}} {among} is {{v}}" for among in _AMONG),
            *(f"the {{r}} I like best {among} is {{v}}" for among in _AMONG),
            *(f"I {often} {{v}} as my {{r}}" for often in ("often take", "want", "would choose")),
            "I always take {v} for a {r}",
        ),
        _more(
            MOST.facts[2],
            *(f"you {need} {{v}} for my {{r}}" for need in ("must have", "can take", "should use")),
            "the code that you need at my {r} is {v}",
            "I need the code {v} to open my {r}",
            "the number that fits my {r} is {v}",
        ),
        MOST.facts[3],
    ),
)

WORDINGS = {"few": FEW, "many": MANY, "more": MORE, "most": MOST, "all": ALL}
