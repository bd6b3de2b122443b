"""Generated look-up tasks: something is said, other text follows, then it is asked for.

Every item is a chat. `Item.context` is what is read before the first question, so that an
evaluation can evict in between; each turn is a question and its answer.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

import numpy as np
from tokenizers import Tokenizer

from .phrases import ANSWER, FEW, HELD_OUT, SMALL_TALK, SYSTEM_PROMPTS, FactKind, Phrases
from .tokenizer import ASSISTANT, BOS, END, SYSTEM, USER, WordPools

OTHER, ANSWERED = 0, 1  # token classes: predicted with a small and with full loss weight


@dataclass(frozen=True)
class Turn:
    """`question` ends with the assistant token, `answer` with the end token (token ids)."""

    question: list[int]
    answer: list[int]


@dataclass(frozen=True)
class Item:
    """One chat. `context` starts with the beginning-of-text token (token ids)."""

    context: list[int]
    turns: list[Turn]

    def flatten(self) -> tuple[list[int], list[int]]:
        """(token ids, token classes) of the whole chat."""
        ids, classes = list(self.context), [OTHER] * len(self.context)
        for turn in self.turns:
            ids += turn.question + turn.answer
            classes += [OTHER] * len(turn.question) + [ANSWERED] * len(turn.answer)
        return ids, classes


class Prose:
    """Random excerpts of a long token array (uint16 [n])."""

    def __init__(self, ids: np.ndarray, tokenizer: Tokenizer) -> None:
        self.ids = ids
        self.stop = tokenizer.encode(".").ids[0]
        spaced = np.array(
            [
                tokenizer.id_to_token(i).startswith("\u0120")
                for i in range(tokenizer.get_vocab_size())
            ]
        )
        ends = np.flatnonzero(ids[:-1] == self.stop) + 1
        self.ends = ends[spaced[ids[ends]]]

    def ending(self, rng: Random, length: int) -> list[int]:
        """`length` tokens that end with a sentence (they may begin within one)."""
        first = int(np.searchsorted(self.ends, length))
        end = int(self.ends[rng.randrange(first, len(self.ends))])
        return self.ids[end - length : end].tolist()

    def anywhere(self, rng: Random, length: int) -> list[int]:
        start = rng.randrange(len(self.ids) - length)
        return self.ids[start : start + length].tolist()

    def gaps(self, excerpt: list[int]) -> list[int]:
        """Places between two sentences where a sentence can be put in without new tokenisation."""
        found = [i + 1 for i, token in enumerate(excerpt) if token == self.stop]
        return found or [0]


_SMALL_WORDS = (
    "the a an of to in on at by for with from as is was are were be been has had have do did so "
    "very too we I you he she it they us him them this that these those but and or not no now then "
    "here there when where all any some more most only just also always never often again one two"
)


class TaskMaker:
    """Makes items of exactly `length` tokens; the same seed makes the same items.

    `held_out=True` takes the wordings kept for evaluation; `pools` and `prose` must then be the
    held-out ones as well. `invented` is the share of made-up words among keys, values and subjects:
    a model that has met only real ones learns them by heart and does not copy a new one. None of
    the `reserved` words is ever made up. `free` is the share of statements in no wording at all:
    key and value between random small words, in either order: what binds them is the sentence.
    `new_words` is the share of nouns ("secret code") whose first word is any word, and of pairs in
    free wordings that are joined by any word. `loose` is the share of wordings with small words
    thrown in at a random place: they do not change who has what. `long` is the share of made-up
    words of three to five pieces, of which most are rare.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        pools: WordPools,
        prose: Prose,
        held_out: bool = False,
        reserved: Sequence[str] = (),
    ) -> None:
        self.tokenizer, self.pools, self.prose = tokenizer, pools, prose
        self.invented = 0.0
        self.free = 0.0
        self.new_words = 0.0
        self.loose = 0.0
        self.long = 0.0
        self._reserved = {word.lower() for word in reserved}
        pieces = sorted(tokenizer.get_vocab())
        self._beginnings = [p[1:] for p in pieces if re.fullmatch("\u0120[a-z]{2,}", p)]
        self._endings = [p for p in pieces if re.fullmatch("[a-z]{2,}", p)]
        self._scraps = [p for p in pieces if re.fullmatch("[a-z]{1,3}", p)]
        self.phrases: Phrases = HELD_OUT if held_out else FEW
        self.rng = Random(0)
        self._cache: dict[str, list[int]] = {}

    def seed(self, *key: int) -> None:
        self.rng = Random(repr(key))

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def fixed(self, text: str) -> list[int]:
        """Encode a text that comes again and again."""
        if text not in self._cache:
            self._cache[text] = self.encode(text)
        return self._cache[text]

    # ---- pieces -------------------------------------------------------------------------------

    def number(self) -> str:
        if self.rng.random() < 0.75:
            return str(self.rng.randrange(100_000, 1_000_000))
        return str(self.rng.randrange(100, 10_000_000))

    def made_up(self) -> str:
        while True:
            word = self.rng.choice(self._beginnings)
            if self.long > 0 and self.rng.random() < self.long:
                more = (self.rng.choice(self._scraps) for _ in range(self.rng.randint(2, 4)))
                word = word[: self.rng.randint(1, 3)] + "".join(more)
            elif len(word) < 4 or self.rng.random() < 0.5:
                word += self.rng.choice(self._endings)
            if word not in self._reserved:
                return word

    def inventing(self) -> bool:
        return self.invented > 0 and self.rng.random() < self.invented

    def word(self) -> str:
        return self.made_up() if self.inventing() else self.rng.choice(self.pools.words)

    def name(self) -> str:
        if self.inventing():
            return self.made_up().capitalize()
        return self.rng.choice(self.pools.names)

    def key(self) -> str:
        draw = self.rng.random()
        if draw < 0.5:
            return self.word()
        return f"{self.word()}-{self.word()}" if draw < 0.8 else self.name()

    def distinct(self, make: Callable[[], str], count: int) -> list[str]:
        found: dict[str, None] = {}
        while len(found) < count:
            found[make()] = None
        return list(found)

    def freely(self) -> bool:
        return self.free > 0 and self.rng.random() < self.free

    def free_statement(self, key: str = "{k}") -> str:
        """Small words in any order around `key` and {v}, in either order: only the value is a word
        that could be one."""

        def words(most: int) -> list[str]:
            return [self.rng.choice(_SMALL_WORDS.split()) for _ in range(self.rng.randint(0, most))]

        first, second = (key, "{v}") if self.rng.random() < 0.6 else ("{v}", key)
        text = " ".join([*words(3), first, *words(4), second, *words(2)])
        return text + self.rng.choice([".", ".", ".", "!", " now.", ", I think.", ", they say."])

    def joined_pair(self) -> str:
        """Key and value joined by any word, which only its coming back tells from a value."""
        before, after = (self.rng.choice(_SMALL_WORDS.split()) for _ in range(2))
        joined = self.rng.choice(
            [f"{before} {self.word()} {after}", f"{self.word()} {after}", self.word()]
        )
        return f" {{k}} {joined} {{v}}."

    def free_pair(self) -> str:
        """Key and value with random signs or words between them."""
        if self.new_words and self.rng.random() < self.new_words:
            return self.joined_pair()
        if self.rng.random() < 0.4:
            between = f" {self.rng.choice(_SMALL_WORDS.split())} "
        else:
            signs = "".join(self.rng.choice("!#$%&*+-/<=>?@^_|~:") for _ in range(2))
            between = self.rng.choice([signs[0], signs]) + self.rng.choice(["", " "])
            between = self.rng.choice(["", " "]) + between
        return f" {{k}}{between}{{v}}."

    def worded(self, wordings: Sequence[str]) -> str:
        """One of the wordings, sometimes with one to three small words more between two of its
        words."""
        wording = self.rng.choice(wordings)
        if not self.loose or self.rng.random() >= self.loose:
            return wording
        words = wording.split(" ")
        place = self.rng.randint(1 + (not words[0]), len(words))
        extra = [self.rng.choice(_SMALL_WORDS.split()) for _ in range(self.rng.randint(1, 3))]
        if place == len(words):  # before the full stop or question mark
            last = re.fullmatch(r"(.*?)([.?!]?)", words[-1])
            assert last
            words[-1], extra[-1] = last[1], extra[-1] + last[2]
        return " ".join([*words[:place], *extra, *words[place:]])

    def opening(self) -> list[int]:
        if self.rng.random() < 0.2:
            return [BOS, SYSTEM, *self.fixed(self.rng.choice(SYSTEM_PROMPTS)), END]
        return [BOS]

    def scatter(self, sentences: Sequence[list[int]], room: int) -> list[int]:
        """Put the sentences, in their order, between the sentences of `room` tokens of prose."""
        text = self.prose.ending(self.rng, room) if room else []
        gaps = self.prose.gaps(text)
        out, last = [], 0
        places = sorted(self.rng.choice(gaps) for _ in sentences)
        for place, sentence in zip(places, sentences, strict=True):
            out += text[last:place] + sentence
            last = place
        return out + text[last:]

    def turns(self, pairs: Sequence[tuple[str, str]], asked_in_text: bool) -> list[Turn]:
        """Questions and answers; the first question may end the user turn that holds the text."""
        made = []
        for i, (question, answer) in enumerate(pairs):
            inside = asked_in_text and i == 0
            start = [] if inside else [USER]
            text = question if inside else question.lstrip()
            made.append(
                Turn([*start, *self.encode(text), END, ASSISTANT], [*self.encode(answer), END])
            )
        return made

    def in_text(
        self, length: int, sentences: list[str], pairs: Sequence[tuple[str, str]], opening: str = ""
    ) -> Item | None:
        """Sentences scattered over prose in one user turn, then the questions."""
        needles = [self.encode(s) for s in sentences]
        turns = self.turns(pairs, asked_in_text=True)
        head = [*self.opening(), USER, *self.fixed(opening)]
        used = len(head) + sum(map(len, needles))
        used += sum(len(t.question) + len(t.answer) for t in turns)
        if used > length:
            return None
        return Item(head + self.scatter(needles, length - used), turns)

    def noun(self, known: Sequence[str]) -> str:
        """What a value is, such as "secret code"."""
        noun = self.rng.choice(known)
        if self.new_words and self.rng.random() < self.new_words:
            noun = f"{self.word()} {noun.split()[-1]}"
        return noun

    def needle_wording(self) -> str:
        """Template with {n}, {k} and {v}, or without {n}."""
        if self.freely():
            return " " + self.free_statement()
        return self.worded(self.phrases.needles)

    # ---- tasks --------------------------------------------------------------------------------

    def needle(
        self,
        length: int,
        keys: int | None = None,
        values: int | None = None,
        asked: int | None = None,
        kind: str | None = None,
        at_once: bool = False,
    ) -> Item | None:
        """Find what was said about a key; `asked` of `keys` keys, one turn each or `at_once`."""
        rng, p = self.rng, self.phrases
        kind = kind or rng.choice(["number", "number", "word"])
        noun = self.noun(p.number_nouns if kind == "number" else p.word_nouns)
        keys = keys or rng.randint(1, max(1, min(24, length // 40)))
        names = self.distinct(self.key, keys)
        value = self.number if kind == "number" else self.word
        counts = [1] * keys
        if values:
            counts = [values if i == 0 or rng.random() < 0.5 else 1 for i in range(keys)]
        told = {k: self.distinct(value, n) for k, n in zip(names, counts, strict=True)}
        owners = [k for k in names for _ in told[k]]
        rng.shuffle(owners)
        upcoming = {k: iter(v) for k, v in told.items()}
        # Repeated keys keep one wording, as in RULER's multi-value task.
        wording = {k: self.needle_wording() for k in names}
        sentences = [wording[k].format(n=noun, k=k, v=next(upcoming[k])) for k in owners]

        asked = min(keys, asked or rng.randint(1, max(1, length // 60)))
        chosen = [names[0], *rng.sample(names[1:], asked - 1)]
        if not values:
            rng.shuffle(chosen)
        answers = [ANSWER.format(k=k, v=", ".join(told[k])) for k in chosen]
        if at_once:
            listed = ", ".join(chosen[:-1]) + " and " + chosen[-1] if asked > 1 else chosen[0]
            question = self.worded(p.several_keys).format(n=noun, k=listed)
            return self.in_text(length, sentences, [(question, " ".join(answers))])
        pairs = [
            (self.worded(p.questions if len(told[k]) == 1 else p.all_values).format(n=noun, k=k), a)
            for k, a in zip(chosen, answers, strict=True)
        ]
        return self.in_text(length, sentences, pairs)

    def variables(
        self,
        length: int,
        chains: int | None = None,
        hops: int | None = None,
        asked: int | None = None,
        names: bool | None = None,
    ) -> Item | None:
        """Follow assignments: the value of the last variable, or all variables of a value.

        The answer walks the chain ("X3 = X2 = X1 = 52071"), one look-up per step.
        """
        rng, p = self.rng, self.phrases
        chains = chains or rng.randint(1, max(1, min(5, length // 70)))
        made, steps = [], []
        fresh = iter(
            self.distinct(
                lambda: f"{rng.choice('ABCDKMNPSTXYZ')}{rng.randrange(100, 1000)}", chains * 6
            )
        )
        values = self.distinct(self.number, chains)
        wording = rng.choice(p.assignments)
        for value in values:
            chain = [next(fresh) for _ in range((hops or rng.randint(1, 4)) + 1)]
            made.append((value, chain))
            steps.append(
                iter(
                    [wording.format(x=x, y=y) for x, y in zip(chain, [value, *chain], strict=False)]
                )
            )
        order = [i for i, (_, chain) in enumerate(made) for _ in chain]
        rng.shuffle(order)
        sentences = [next(steps[i]) for i in order]
        asked = min(chains, asked or rng.randint(1, max(1, length // 80)))
        pairs = []
        for value, chain in rng.sample(made, asked):
            if names if names is not None else rng.random() < 0.4:
                question = self.worded(p.variable_names).format(v=value)
                pairs.append((question, ANSWER.format(k=value, v=", ".join(chain))))
            else:
                start = chain[-1]
                question = self.worded(p.variable_value).format(x=start)
                walk = " = ".join([*reversed(chain), value])
                pairs.append((question, ANSWER.format(k=start, v=walk)))
        return self.in_text(length, sentences, pairs)

    def lookup(
        self, length: int, pairs: int | None = None, asked: int | None = None, joined: bool = False
    ) -> Item | None:
        """A list of key-value pairs, then questions; `pairs=0` fills the length with pairs,
        `joined` takes any word between key and value."""
        rng, p = self.rng, self.phrases
        wording, opening = self.worded(p.pairs), rng.choice(p.list_openings)
        if joined:
            wording = self.joined_pair()
        elif self.freely():
            wording = self.free_pair()
        asked = asked or rng.randint(1, max(1, length // 60))
        numbers = rng.random() < 0.5
        value = self.number if numbers else self.word
        # 16 tokens are more than a question and its answer need, 7 fewer than a pair does.
        most = max(2, (length - 34 * asked - 20) // 9)
        count = most if pairs == 0 else min(most, pairs or rng.randint(2, most))
        keys = self.distinct(self.key, count)
        values = [value() for _ in keys]
        sentences = [wording.format(k=k, v=v) for k, v in zip(keys, values, strict=True)]
        chosen = rng.sample(range(count), min(count, asked))
        questions = [
            (self.worded(p.list_questions).format(k=keys[i]), ANSWER.format(k=keys[i], v=values[i]))
            for i in chosen
        ]
        needles = [self.encode(s) for s in sentences]
        turns = self.turns(questions, asked_in_text=True)
        head = [*self.opening(), USER, *self.fixed(opening.lstrip())]
        room = length - len(head) - sum(len(t.question) + len(t.answer) for t in turns)
        while needles and sum(map(len, needles)) > room:
            last = len(needles) - 1
            if last in chosen:
                return None
            needles.pop()
        if not needles:
            return None
        # What the list leaves free is prose around it.
        listed = [token for needle in needles for token in needle]
        return Item(head + self.scatter([listed], room - len(listed)), turns)

    def fact(self) -> tuple[str, str, str, str]:
        """(subject, statement, question, answer)"""
        rng = self.rng
        kind: FactKind = rng.choice(self.phrases.facts)
        subject = self.word() if self.inventing() else rng.choice(kind.subjects)
        value = {"name": self.name, "word": self.word, "number": self.number}[kind.value]()
        wording = self.free_statement("my {r}") if self.freely() else self.worded(kind.statements)
        statement = wording.format(r=subject, v=value)
        return (
            subject,
            statement,
            self.worded(kind.questions).format(r=subject),
            kind.answer.format(r=subject, v=value),
        )

    def facts(self, length: int, count: int | None = None, asked: int | None = None) -> Item | None:
        """Facts told in user turns, stories and small talk between them, questions at the end."""
        rng, p = self.rng, self.phrases
        most = sum(len(kind.subjects) for kind in p.facts)
        count = min(most, count or rng.randint(1, max(1, min(16, length // 40))))
        told: dict[str, tuple[str, str, str, str]] = {}
        while len(told) < count:
            fact = self.fact()
            told.setdefault(fact[0], fact)
        asked = min(count, asked or rng.randint(1, max(1, length // 60)))
        chosen = rng.sample(list(told.values()), asked)
        turns = self.turns([(f[2], f[3]) for f in chosen], asked_in_text=False)
        head = self.opening()
        exchanges = []
        for _, statement, _, _ in told.values():
            said = self.encode(statement)
            # Some facts come at the end of a longer message.
            if rng.random() < 0.25 and length > 250:
                said = self.prose.ending(rng, rng.randint(10, 60)) + self.encode(" " + statement)
            reply = self.fixed(rng.choice(p.acknowledgements))
            exchanges.append([USER, *said, END, ASSISTANT, *reply, END])
        room = length - len(head) - sum(map(len, exchanges))
        room -= sum(len(t.question) + len(t.answer) for t in turns)
        if room < 0:
            return None
        while room:
            if room > 40 and rng.random() < 0.2:
                asks, says = rng.choice(SMALL_TALK)
                between = [USER, *self.fixed(asks), END, ASSISTANT, *self.fixed(says), END]
            else:
                request = self.fixed(rng.choice(p.prose_requests))
                frame = len(request) + 4
                if room < frame + 8:
                    # Too little for another exchange: lengthen the first message.
                    exchanges[0][1:1] = self.prose.ending(rng, room)
                    break
                size = min(room, rng.randint(frame + 8, max(frame + 8, length // 4)))
                story = self.prose.ending(rng, size - frame)
                between = [USER, *request, END, ASSISTANT, *story, END]
            exchanges.insert(rng.randint(0, len(exchanges)), between)
            room -= len(between)
        return Item(head + [token for e in exchanges for token in e], turns)

    def told(self, length: int) -> Item | None:
        """Facts or needles in one long message, the question below it: a document that is asked."""
        rng, p = self.rng, self.phrases
        count = rng.randint(1, max(1, min(12, length // 50)))
        count = min(count, sum(len(kind.subjects) for kind in p.facts))
        told: dict[str, tuple[str, str, str]] = {}
        if rng.random() < 0.5:
            while len(told) < count:
                subject, statement, question, answer = self.fact()
                told.setdefault(subject, (f" {statement}", question, answer))
        else:
            noun = self.noun(p.number_nouns)
            for key in self.distinct(self.key, count):
                value = self.number()
                told[key] = (
                    self.needle_wording().format(n=noun, k=key, v=value),
                    self.worded(p.questions).format(n=noun, k=key).lstrip(),
                    ANSWER.format(k=key, v=value),
                )
        asked = rng.sample(list(told.values()), rng.randint(1, max(1, min(count, length // 80))))
        gap = rng.choice([" ", "\n", "\n\n"])
        pairs = [(gap + question, answer) for _, question, answer in asked]
        return self.in_text(length, [statement for statement, _, _ in told.values()], pairs)

    def copying(self, length: int) -> Item | None:
        """Repeat a text given by the user, sometimes after a story."""
        rng = self.rng
        head, request = self.opening(), self.fixed(rng.choice(self.phrases.copy_requests))
        fixed = len(head) + len(request) + 4
        size = rng.randint(4, max(4, min(200, (length - fixed) // 2)))
        body = self.prose.ending(rng, size)
        if rng.random() < 0.3:
            rng.shuffle(body)
        rest = length - fixed - 2 * size
        if rest < 0:
            return None
        story = self.prose.ending(rng, rest) if rest else []
        return Item([*head, USER, *story, *request], [Turn([*body, END, ASSISTANT], [*body, END])])

    def packed(self, length: int) -> tuple[list[int], list[int]]:
        """Short chats one after the other, each from its own beginning-of-text token."""
        rng = self.rng
        count = max(1, length // rng.randint(72, 240))
        ids: list[int] = []
        classes: list[int] = []
        for left in range(count, 0, -1):
            size = (length - len(ids)) // left
            while (item := CHATS[rng.choice(_SHORT)](self, size)) is None:
                pass
            more, kinds = item.flatten()
            ids, classes = ids + more, classes + kinds
        return ids, classes

    # ---- raw training streams -----------------------------------------------------------------

    def repeated(self, length: int) -> tuple[list[int], list[int]]:
        """A segment over and over: the simplest text in which looking back pays."""
        rng = self.rng
        size = rng.randint(8, max(8, min(300, length // 2)))
        segment = self.prose.anywhere(rng, size)
        if rng.random() < 0.6:
            rng.shuffle(segment)
        ids = ([BOS] + segment * (length // size + 1))[:length]
        return ids, [OTHER] * min(length, size + 2) + [ANSWERED] * (length - size - 2)

    def associations(self, length: int) -> tuple[list[int], list[int]]:
        """Pairs of single tokens, then the same pairs in any order."""
        rng = self.rng
        count = rng.randint(3, max(3, min(80, length // 8)))
        size = self.tokenizer.get_vocab_size()
        keys = rng.sample(range(FIRST_LEARNED, size), count)
        values = [rng.randrange(FIRST_LEARNED, size) for _ in keys]
        order = rng.sample(range(count), count)
        while len(order) * 3 < length:
            order.append(rng.randrange(count))
        ids, classes = [BOS], [OTHER]
        for n, i in enumerate(order):
            ids += [keys[i], values[i], self.prose.stop]
            classes += [OTHER, ANSWERED if n >= count else OTHER, OTHER]
        return ids[:length], classes[:length]

    def successions(self, length: int) -> tuple[list[int], list[int]]:
        """Pairs of single tokens with two to four values to a key, then every key with all of its
        values in the order they came in; and again with other tokens."""
        rng = self.rng
        ids, classes = [BOS], [OTHER]
        while len(ids) < length:
            count = rng.randint(1, max(1, min(20, length // 24)))
            symbols = rng.sample(range(FIRST_LEARNED, self.tokenizer.get_vocab_size()), count * 5)
            lists = [
                (symbols[i], symbols[i + 1 : i + 1 + rng.randint(2, 4)])
                for i in range(0, len(symbols), 5)
            ]
            owners = [i for i, (_, values) in enumerate(lists) for _ in values]
            rng.shuffle(owners)
            upcoming = [iter(values) for _, values in lists]
            for i in owners:
                ids += [lists[i][0], next(upcoming[i]), self.prose.stop]
                classes += [OTHER] * 3
            for key, values in rng.sample(lists, count):
                ids += [key, *values, self.prose.stop]
                classes += [OTHER, *[ANSWERED] * len(values), ANSWERED]
        return ids[:length], classes[:length]

    def reading(self, length: int) -> tuple[list[int], list[int]]:
        """Plain prose, sometimes told by the assistant."""
        rng = self.rng
        if rng.random() < 0.85:
            ids = [BOS, *self.prose.anywhere(rng, length - 1)]
        else:
            request = self.fixed(rng.choice(self.phrases.prose_requests))
            frame = [*self.opening(), USER, *request, END, ASSISTANT]
            ids = [*frame, *self.prose.ending(rng, length - len(frame) - 1), END]
        return ids, [OTHER] * length


FIRST_LEARNED = 261  # after the special tokens and the single bytes


# ---- mixing -----------------------------------------------------------------------------------

CHATS: dict[str, Callable[[TaskMaker, int], Item | None]] = {
    "needle": TaskMaker.needle,
    "queries": lambda m, n: m.needle(
        n, keys=m.rng.randint(2, 6), asked=m.rng.randint(2, 4), at_once=True
    ),
    "values": lambda m, n: m.needle(
        n, keys=m.rng.randint(1, max(1, min(6, n // 90))), values=m.rng.randint(2, 4)
    ),
    "listing": lambda m, n: m.needle(n, keys=m.rng.randint(1, 3), values=m.rng.randint(2, 5)),
    "variables": TaskMaker.variables,
    "names": lambda m, n: m.variables(n, names=True),
    "lookup": TaskMaker.lookup,
    "joined": lambda m, n: m.lookup(n, joined=True),
    "facts": TaskMaker.facts,
    "told": TaskMaker.told,
    "copying": TaskMaker.copying,
}
_SHORT = ("needle", "queries", "listing", "variables", "lookup", "facts", "told")
_STREAMS: dict[str, Callable[[TaskMaker, int], tuple[list[int], list[int]]]] = {
    "repeated": TaskMaker.repeated,
    "associations": TaskMaker.associations,
    "successions": TaskMaker.successions,
    "packed": TaskMaker.packed,
    "reading": TaskMaker.reading,
}
TASKS = (*CHATS, *_STREAMS)


def sample(maker: TaskMaker, mix: dict[str, float], length: int) -> tuple[list[int], list[int]]:
    """(token ids, token classes) of one training sequence of `length` tokens, drawn from `mix`."""
    while True:
        task = maker.rng.choices(list(mix), list(mix.values()))[0]
        if task in _STREAMS:
            return _STREAMS[task](maker, length)
        if (item := CHATS[task](maker, length)) is not None:
            return item.flatten()
