"""Wordings of the generated tasks: `FEW` for the first stages, and `HELD_OUT` for evaluation.

`HELD_OUT` shares no template, no noun and no subject with `FEW` and its extension in wordings.py.

Placeholders: {n} noun, {k} key, {v} value, {x} variable, {y} value or variable, {r} subject.
Answers are worded the same in both sets: an exact match then asks for the looked-up content and not
for a guess of somebody's taste in phrasing.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class FactKind:
    """Something a user says about herself and asks for later."""

    subjects: tuple[str, ...]
    value: str  # "name", "word" or "number"
    statements: tuple[str, ...]
    questions: tuple[str, ...]
    answer: str


@dataclass(frozen=True)
class Phrases:
    """All wordings of one set."""

    number_nouns: tuple[str, ...]
    word_nouns: tuple[str, ...]
    needles: tuple[str, ...]
    questions: tuple[str, ...]
    all_values: tuple[str, ...]  # {n} is a plural here
    several_keys: tuple[str, ...]  # {k} is a list of keys
    assignments: tuple[str, ...]
    variable_value: tuple[str, ...]
    variable_names: tuple[str, ...]
    pairs: tuple[str, ...]
    list_openings: tuple[str, ...]
    list_questions: tuple[str, ...]
    facts: tuple[FactKind, ...]
    acknowledgements: tuple[str, ...]
    copy_requests: tuple[str, ...]
    prose_requests: tuple[str, ...]


ANSWER = "For {k}: {v}."
SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "Answer briefly.",
    "You remember what you are told.",
    "Use only what is written in the text.",
)
SMALL_TALK = (
    ("Hello.", "Hello! How can I help you?"),
    ("Hi!", "Hello! How can I help you?"),
    ("Good morning.", "Good morning! How can I help you?"),
    ("How are you?", "I am well, thank you. And you?"),
    ("Thank you.", "You are welcome."),
    ("Who are you?", "I am a small model that looks things up in what it has read."),
    ("Goodbye.", "Goodbye! It was a pleasure."),
)

_NAMED = "{r} is called {v}."
FEW = Phrases(
    number_nouns=(
        "magic number",
        "secret code",
        "ticket number",
        "house number",
        "lucky number",
        "room number",
        "account number",
        "key number",
        "order number",
        "special number",
    ),
    word_nouns=(
        "magic word",
        "secret word",
        "password",
        "favourite word",
        "last word",
        "special word",
        "true name",
        "sign",
    ),
    needles=(
        " The {n} for {k} is {v}.",
        " One of the {n}s for {k} is {v}.",
        " Remember that the {n} of {k} is {v}.",
        " {k} has the {n} {v}.",
        " For {k}, the {n} is {v}.",
        " The {n} given to {k} was {v}.",
        " Note that {k} uses the {n} {v}.",
        " It was written that the {n} of {k} was {v}.",
        " One of the special magic {n}s for {k} is: {v}.",
        " As to {k}, its {n} is {v}.",
        " He said that the {n} for {k} is {v}.",
        " The {n} of {k} is {v}.",
    ),
    questions=(
        " What is the {n} for {k}?",
        " Which {n} does {k} have?",
        " Tell me the {n} of {k}.",
        " What was the {n} given to {k}?",
        " Find the {n} of {k} in the text.",
        " I need the {n} for {k}.",
        " Do you know the {n} of {k}?",
        " What is the {n} for {k} mentioned in the text?",
        " And the {n} for {k}?",
        " Now give me the {n} that goes with {k}.",
    ),
    all_values=(
        " What are all the {n}s for {k} mentioned in the text?",
        " Which {n}s does {k} have?",
        " Tell me all {n}s of {k}.",
        " List the {n}s of {k} in order.",
        " Find every {n} of {k}.",
        " I need all the {n}s for {k}.",
    ),
    several_keys=(
        " What are the {n}s for {k}?",
        " Tell me the {n}s of {k}.",
        " Which {n}s do {k} have?",
        " I need the {n}s for {k}.",
    ),
    assignments=(
        " VAR {x} = {y}.",
        " {x} = {y}.",
        " Let {x} be {y}.",
        " Set {x} to {y}.",
        " {x} is set to {y}.",
        " {x} takes the value of {y}.",
        " Now {x} equals {y}.",
        " Put {x} = {y} here.",
    ),
    variable_value=(
        " What is the value of {x}?",
        " Which value does {x} have?",
        " Find the value of {x}.",
        " Follow {x} to its value.",
        " What does {x} stand for?",
    ),
    variable_names=(
        " Find all variables that are assigned the value {v}.",
        " Which variables have the value {v}?",
        " List the variables equal to {v}.",
        " Which variables stand for {v}?",
    ),
    pairs=(" {k}: {v}.", " {k} is {v}.", " {k} = {v}.", " {k} - {v}.", " {k} has {v}."),
    list_openings=(
        " Here is a list.",
        " Read this list.",
        " These belong together.",
        " Remember these pairs.",
    ),
    list_questions=(
        " What is next to {k}?",
        " What belongs to {k}?",
        " Look up {k}.",
        " What is the value of {k}?",
        " And {k}?",
        " Which entry does {k} have?",
    ),
    facts=(
        FactKind(
            (
                "dog",
                "cat",
                "horse",
                "parrot",
                "sister",
                "brother",
                "mother",
                "father",
                "wife",
                "husband",
                "son",
                "boss",
                "friend",
                "doctor",
                "teacher",
                "uncle",
                "cousin",
                "boat",
                "school",
                "street",
                "village",
                "band",
            ),
            "name",
            (
                "My " + _NAMED,
                "I have a {r} called {v}.",
                "The name of my {r} is {v}.",
                "My {r} is named {v}.",
                "You must know that my {r} is called {v}.",
                "By the way, {v} is my {r}.",
                "I call my {r} {v}.",
            ),
            (
                "What is my {r} called?",
                "What is the name of my {r}?",
                "How do I call my {r}?",
                "Do you remember the name of my {r}?",
                "Tell me the name of my {r}.",
            ),
            "Your " + _NAMED,
        ),
        FactKind(
            (
                "colour",
                "food",
                "book",
                "song",
                "drink",
                "season",
                "animal",
                "game",
                "flower",
                "fruit",
                "tree",
                "bird",
                "tool",
                "place",
            ),
            "word",
            (
                "My favourite {r} is {v}.",
                "The {r} I like best is {v}.",
                "Of every {r} I prefer {v}.",
                "I think {v} is the best {r}.",
                "If you ask me for a {r}, I say {v}.",
            ),
            (
                "What is my favourite {r}?",
                "Which {r} do I like best?",
                "Do you remember my favourite {r}?",
                "Which {r} do I prefer?",
            ),
            "Your favourite {r} is {v}.",
        ),
        FactKind(
            ("safe", "locker", "bike", "phone", "garage", "office", "door", "card", "gate"),
            "number",
            (
                "The code of my {r} is {v}.",
                "My {r} has the code {v}.",
                "I open my {r} with the code {v}.",
                "Keep the code {v} for my {r}.",
                "To use my {r}, the code is {v}.",
            ),
            (
                "What is the code of my {r}?",
                "Which code does my {r} have?",
                "Tell me the code of my {r}.",
                "Do you remember the code of my {r}?",
            ),
            "The code of your {r} is {v}.",
        ),
        FactKind(
            ("aunt", "daughter", "nephew", "neighbour", "partner", "captain", "lawyer"),
            "name",
            (
                "My {r} lives in {v}.",
                "I have a {r} in {v}.",
                "My {r} has a house in {v}.",
                "My {r} moved to {v}.",
            ),
            (
                "Where does my {r} live?",
                "In which place does my {r} live?",
                "Do you remember where my {r} lives?",
            ),
            "Your {r} lives in {v}.",
        ),
    ),
    acknowledgements=(
        "Okay.",
        "Good to know.",
        "Thank you, I will remember that.",
        "I see.",
        "Noted.",
        "That is interesting.",
    ),
    copy_requests=("Repeat this:", "Say this again:", "Copy the text:", "Write this once more:"),
    prose_requests=(
        "Tell me something.",
        "Tell me a story.",
        "Go on.",
        "What happened then?",
        "Read to me.",
        "Continue.",
        "What do you think?",
        "Write a few sentences.",
    ),
)

HELD_OUT = Phrases(
    number_nouns=("registration number", "door code", "winning number"),
    word_nouns=("hidden word", "strange word"),
    needles=(
        " The {n} that belongs to {k} is {v}.",
        " People say the {n} of {k} is {v}.",
        " We know that the {n} for {k} is {v}.",
    ),
    questions=(
        " Please look up the {n} of {k}.",
        " What did the text say is the {n} for {k}?",
        " Can you find the {n} for {k}?",
    ),
    all_values=(" Please name all the {n}s for {k}.", " What are the {n}s of {k} in the text?"),
    several_keys=(" Please look up the {n}s for {k}.",),
    assignments=(" Here {x} = {y}.", " Let {x} = {y}."),
    variable_value=(" Please find the value of {x}.", " Tell me the value of {x}."),
    variable_names=(
        " Name all variables that have the value {v}.",
        " Find the variables equal to {v}.",
    ),
    pairs=(" {k} <=> {v}.", " {k} is listed with {v}."),
    list_openings=(" Look at the list below.",),
    list_questions=(" Please look up {k}.", " Find {k} in the list.", " What goes with {k}?"),
    facts=(
        FactKind(
            ("rabbit", "company", "team", "donkey"),
            "name",
            ("You should know that my {r} is called {v}.", "We named my {r} {v}."),
            ("Can you tell me what my {r} is called?", "Please tell me the name of my {r}."),
            "Your " + _NAMED,
        ),
        FactKind(
            ("city", "word", "plant"),
            "word",
            ("The best {r} of all is {v}, I think.", "I always choose {v} as my {r}."),
            ("Please tell me my favourite {r}.", "Which is my favourite {r}?"),
            "Your favourite {r} is {v}.",
        ),
        FactKind(
            ("suitcase", "shed", "alarm"),
            "number",
            ("You need the code {v} for my {r}.", "The code that opens my {r} is {v}."),
            ("Please tell me the code of my {r}.", "What code does my {r} need?"),
            "The code of your {r} is {v}.",
        ),
    ),
    acknowledgements=("All right.", "Very well."),
    copy_requests=("Please repeat:",),
    prose_requests=("Please tell me a story.",),
)
