"""Synthetic conversations: each user turn has one right answer, known when it is made.

All randomness comes from the random.Random given, all values from the split given (words.py). A turn is
(kind, user text, assistant text); KINDS are those the model is measured by.
"""

import random

from demo_model import tandem_facts
from demo_model.words import BANKS, CAPITALISED, HELDOUT, TRAIN, made_up_word, number, split_of, value

DEFAULT_SYSTEM = "You are the demo assistant of Tandem."
KINDS = ("add", "subtract", "multiply", "recall", "repeat", "reverse", "tandem", "smalltalk")
UNKNOWN = "You have not told me that yet."
REST_UNKNOWN = " You have not told me the rest yet."

# ---------------------------------------------------------------- arithmetic

_SUM_FORMS = {
    "add": ["What is {a} + {b}?", "{a} + {b}", "{a} + {b} = ?", "{a}+{b}", "What is {a} plus {b}?", "{a} plus {b}",
            "Add {a} and {b}.", "Add {b} to {a}.", "How much is {a} + {b}?", "Compute {a} + {b}.", "What's {a}+{b}?",
            "What is the sum of {a} and {b}?", "Calculate {a} + {b}.", "{a} + {b} =", "Can you add {a} and {b}?",
            "I have {a} apples and get {b} more. How many do I have?"],
    "subtract": ["What is {a} - {b}?", "{a} - {b}", "{a} - {b} = ?", "{a}-{b}", "What is {a} minus {b}?", "{a} minus {b}",
                 "Subtract {b} from {a}.", "Take {b} away from {a}.", "How much is {a} - {b}?", "Compute {a} - {b}.",
                 "What's {a}-{b}?", "Calculate {a} - {b}.", "{a} - {b} =", "Can you subtract {b} from {a}?",
                 "What is the difference of {a} and {b}?"],
    "multiply": ["What is {a} * {b}?", "{a} * {b}", "{a} * {b} = ?", "{a}*{b}", "What is {a} times {b}?", "{a} times {b}",
                 "Multiply {a} by {b}.", "Multiply {a} and {b}.", "How much is {a} x {b}?", "Compute {a} * {b}.",
                 "What's {a} x {b}?", "What is the product of {a} and {b}?", "Calculate {a} * {b}.", "{a} x {b}",
                 "What is {a} × {b}?", "How much is {a} times {b}?"],
}
_SIGN = {"add": "+", "subtract": "-", "multiply": "*"}
_SUM_ONE_IN = 12


def _sum_split(op: str, a: int, b: int) -> str:
    """Split of a sum; single-digit sums are all for training (there are too few to spare)."""
    if a < 10 and b < 10:
        return TRAIN
    if op != "subtract":
        a, b = max(a, b), min(a, b)
    return split_of(f"{a} {_SIGN[op]} {b}", _SUM_ONE_IN)


def _operands(rng: random.Random, op: str, split: str) -> tuple[int, int]:
    if op == "multiply":
        digits = rng.random()
        # Three-digit factors are practice for the two-digit ones; only these are measured.
        if split == TRAIN and digits < 0.35:
            a = rng.randint(100, 999)
        elif split == TRAIN and digits < 0.45:
            a = rng.randint(0, 9)
        else:
            a = rng.randint(10, 99)
        b = rng.randint(0, 9)
        return (a, b) if rng.random() < 0.7 else (b, a)
    low = (0, 0, 10, 100)
    da, db = (rng.choice((1, 2, 2, 3, 3, 3)) for _ in range(2))
    a, b = rng.randint(low[da], 10**da - 1), rng.randint(low[db], 10**db - 1)
    if op == "subtract" and a < b and rng.random() < 0.75:
        a, b = b, a
    return a, b


def arithmetic_turn(rng: random.Random, split: str, op: str) -> tuple[str, str, str]:
    while True:
        a, b = _operands(rng, op, split)
        if _sum_split(op, a, b) == split:
            break
    result = a + b if op == "add" else a - b if op == "subtract" else a * b
    question = rng.choice(_SUM_FORMS[op]).format(a=a, b=b)
    if rng.random() < 0.1:
        question = rng.choice(["Hi! ", "Ok. ", "And now: ", "Please: ", "Next: ", "Quick sum: "]) + question
    return op, question, f"{a} {_SIGN[op]} {b} = {result}."


# ---------------------------------------------------------------- lists

_LIST_FORMS = {
    "repeat": ["Repeat: {}", "Repeat these words: {}", "Repeat this list: {}", "Repeat after me: {}", "Please repeat: {}",
               "Say this list again: {}", "Say this back to me: {}", "Say these again: {}", "Can you repeat this? {}",
               "Give me this list again: {}", "Echo: {}", "Please say these words again: {}", "Repeat the following: {}"],
    "reverse": ["Reverse: {}", "Reverse these words: {}", "Reverse this list: {}", "Say this list backwards: {}",
                "Please reverse: {}", "Give me this list backwards: {}", "Say these in reverse order: {}", "Turn this list around: {}",
                "Can you reverse this? {}", "Read this list backwards: {}", "Reverse the order: {}", "Reverse the following: {}",
                "Please say these words backwards: {}"],
}
_LIST_LEAD = {"repeat": "Again: ", "reverse": "Reversed: "}


def _items(rng: random.Random) -> list[str]:
    count = rng.randint(3, 8)
    style = rng.random()
    if style < 0.3:
        top = rng.choice((9, 99, 99, 999))
        return [str(rng.randint(0, top)) for _ in range(count)]
    if style < 0.36:
        return [rng.choice("ABCDEFGHIJKLMNOPQRSTUVWXYZ") for _ in range(count)]
    if style < 0.42:
        return [rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(count)]
    bank = BANKS["word"] if style < 0.8 else BANKS[rng.choice(("name", "city", "colour", "fruit", "animal", "drink", "language"))]
    made = 0.08 if style < 0.9 else 0.5
    return [made_up_word(rng, TRAIN) if rng.random() < made else rng.choice(bank) for _ in range(count)]


def list_turn(rng: random.Random, split: str, kind: str) -> tuple[str, str, str]:
    while True:
        items = _items(rng)
        if split_of("list " + " ".join(items), 8) == split:
            break
    text = (", " if rng.random() < 0.85 else " ").join(items)
    answer = ", ".join(items if kind == "repeat" else items[::-1])
    form = rng.choice(_LIST_FORMS[kind])
    return kind, form.format(text) + ("." if rng.random() < 0.1 else ""), _LIST_LEAD[kind] + answer


# ---------------------------------------------------------------- facts told and recalled


class _Attribute:
    """One thing a user can say about themselves: how it is told, asked and answered."""

    def __init__(self, key, value_kind, tell, ask, indirect, answer, weight=1.0):
        self.key, self.value_kind, self.weight = key, value_kind, weight
        self.tell, self.ask, self.indirect, self.answer = tell, ask, indirect, answer


def _thing(key, phrase, value_kind, weight=1.0, more_tell=(), more_ask=()):
    """An attribute that is "my <phrase>"."""
    tell = [f"my {phrase} is {{}}"] * 3 + [f"my {phrase}: {{}}", *more_tell]
    if value_kind in CAPITALISED or value_kind == "number":  # Else a sentence's start would change the value's case.
        tell.append(f"{{}} is my {phrase}")
    return _Attribute(
        key, value_kind, tell,
        [f"what is my {phrase}", f"what's my {phrase}", f"which is my {phrase}", *more_ask],
        [f"what my {phrase} is", f"my {phrase}"], f"your {phrase} is {{}}", weight)


def _named(key, noun, value_kind, weight=1.0):
    """An attribute that is the name of "my <noun>"."""
    return _Attribute(
        key, value_kind,
        [f"my {noun} is called {{}}", f"my {noun} is named {{}}", f"I have a {noun} called {{}}", f"I have a {noun} named {{}}", f"I've got a {noun} called {{}}",
         f"the name of my {noun} is {{}}", f"my {noun}'s name is {{}}"],
        [f"what is my {noun} called", f"what is the name of my {noun}", f"what is my {noun}'s name", f"what's my {noun} called"],
        [f"what my {noun} is called", f"the name of my {noun}", f"my {noun}'s name"], f"your {noun} is called {{}}", weight)


ATTRIBUTES = [
    _Attribute("name", "name",
               ["my name is {}"] * 4 + ["I am {}", "I'm {}", "I am called {}", "call me {}", "my name's {}", "you can call me {}"],
               ["what is my name", "what's my name", "who am I", "what am I called", "what is my name"],
               ["what my name is", "my name", "who I am", "what I am called"], "your name is {}", 5.0),
    _Attribute("city", "city",
               ["I live in {}"] * 4 + ["my home is in {}", "my home town is {}", "I am living in {}", "my house is in {}"],
               ["where do I live", "which city do I live in", "in which city do I live", "where is my home", "where do I live"],
               ["where I live", "which city I live in", "where my home is"], "you live in {}", 5.0),
    *[_named(a, a, "pet name", w) for a, w in (("dog", 2.0), ("cat", 2.0), ("horse", 0.6), ("parrot", 0.6), ("rabbit", 0.6),
                                               ("hamster", 0.6), ("turtle", 0.5), ("goldfish", 0.5))],
    *[_named(p, p, "name", 0.6) for p in ("sister", "brother", "best friend", "teacher", "boss", "neighbour")],
    _thing("colour", "favourite colour", "colour", 2.5, ["I like the colour {} best"], ["which colour do I like best"]),
    _thing("food", "favourite food", "food", 2.5, ["I like to eat {} most"], ["what do I like to eat most"]),
    _thing("number", "favourite number", "number", 2.5),
    _thing("lucky", "lucky number", "number", 1.0),
    _thing("drink", "favourite drink", "drink", 1.2, ["I like to drink {} most"], ["what do I like to drink most"]),
    _thing("fruit", "favourite fruit", "fruit", 0.8),
    _thing("animal", "favourite animal", "animal", 0.8),
    _thing("sport", "favourite sport", "sport", 0.8),
    _thing("season", "favourite season", "season", 0.4),
    _thing("planet", "favourite planet", "planet", 0.4),
    _thing("flower", "favourite flower", "flower", 0.4),
    _thing("language", "favourite language", "language", 0.6),
    _thing("code", "door code", "number", 0.8),
    _thing("room", "room number", "number", 0.6),
    _Attribute("job", "job", ["I work as {}", "I am {}", "my job is {}", "I earn my living as {}"],
               ["what is my job", "what do I do for a living", "what do I work as", "what's my job"],
               ["what my job is", "my job", "what I work as"], "you work as {}", 1.5),
    _Attribute("age", "age", ["I am {} years old", "I'm {} years old", "my age is {}"],
               ["how old am I", "what is my age", "what's my age"], ["how old I am", "my age"], "you are {} years old", 1.2),
    _Attribute("birthday", "month", ["my birthday is in {}", "I was born in {}", "my month of birth is {}"],
               ["when is my birthday", "in which month is my birthday", "when was I born", "in which month was I born"],
               ["when my birthday is", "when I was born"], "your birthday is in {}", 1.0),
]
_WEIGHTS = [a.weight for a in ATTRIBUTES]

_FILLER = [
    "It is a sunny day here.", "I just started to use Tandem.", "I have a long day ahead.", "The weather is fine today.",
    "I am new here.", "This is my first chat.", "I had a good breakfast.", "It rains a lot this week.", "I am a bit tired.",
    "I hope you are well.", "I like to read in the evening.", "The coffee here is good.", "I slept very well.",
    "I am testing this demo.", "There is a lot of noise outside.", "I have some questions for you.", "Let me tell you about me.",
    "Here is something about me.", "I will ask you about it later.", "We will talk for a while.", "Work was busy today.",
]
_REMEMBER = ["Please remember that.", "Please remember this.", "Remember that.", "Please keep that in mind.", "Do not forget it.",
             "Remember this for later.", "Please remember all of this.", "Can you remember that?", "Keep it in mind, please."]
_HELLO = ["Hi!", "Hello!", "Hey!", "Hello there!", "Good morning!", "Hi there!", "Hi,", "Hello,", "Good evening!"]


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def filler_sentence(rng: random.Random) -> str:
    """A sentence that tells nothing about the user."""
    if rng.random() < 0.6:
        return rng.choice(_FILLER)
    noun, other = rng.choice(BANKS["word"]), rng.choice(BANKS["word"])
    adjective, verb = rng.choice(BANKS["adjective"]), rng.choice(BANKS["verb"])
    place = rng.choice(("near", "behind", "under", "beside", "above", "on", "in"))
    return rng.choice((f"The {adjective} {noun} {verb} {place} the {other}.", f"There is a {noun} {place} the {adjective} {other}.",
                       f"A {noun} is not a {other}.", f"The {noun} and the {other} are {adjective}."))


class Person:
    """The facts a conversation's user told so far; asks about them know the right answer."""

    def __init__(self, rng: random.Random, split: str):
        self._rng, self._split = rng, split
        self.facts: dict[str, tuple[_Attribute, str]] = {}

    def _value(self, kind: str) -> str:
        if kind == "number":
            return number(self._rng, self._split)
        if kind == "age":
            return str(self._rng.randint(5, 99))
        return value(self._rng, kind, self._split)

    def _pick_new(self, count: int) -> list[_Attribute]:
        picked: list[_Attribute] = []
        for attribute in self._rng.choices(ATTRIBUTES, _WEIGHTS, k=4 * count):
            again = attribute.key in self.facts and self._rng.random() > 0.15
            if attribute not in picked and not again and len(picked) < count:
                picked.append(attribute)
        return picked or self._rng.choices(ATTRIBUTES, _WEIGHTS)

    def tell(self, attributes: list[_Attribute] | None = None) -> tuple[str, str, str]:
        """A turn that tells new facts (or new values of old ones)."""
        rng = self._rng
        attributes = attributes or self._pick_new(rng.choice((1, 1, 1, 2, 2, 3, 3, 4, 5)))
        clauses = []
        for attribute in attributes:
            text = self._value(attribute.value_kind)
            self.facts.pop(attribute.key, None)
            self.facts[attribute.key] = (attribute, text)
            clauses.append(rng.choice(attribute.tell).format(text))
        sentences = [_capital(s) for s in self._join(clauses)]
        while rng.random() < 0.25:
            sentences.insert(rng.randint(0, len(sentences)), filler_sentence(rng))
        if rng.random() < 0.35:
            hello = rng.choice(_HELLO)
            if hello.endswith(","):
                first = sentences[0]
                sentences[0] = first if first.startswith(("I ", "I'")) else first[0].lower() + first[1:]
            sentences.insert(0, hello)
        if rng.random() < 0.4:
            sentences.append(rng.choice(_REMEMBER))
        text = " ".join(sentences)
        if rng.random() < 0.08:
            text = text.rstrip(".")
        name = next((self.facts["name"][1] for a in attributes if a.key == "name"), None)
        answer = f"Nice to meet you, {name}! I will remember that." if name else "Thank you, I will remember that."
        return "tell", text, answer

    def _join(self, clauses: list[str]) -> list[str]:
        """Groups clauses into sentences: "A.", "A and B.", "A, B and C."."""
        rng, sentences, rest = self._rng, [], list(clauses)
        while rest:
            take = rng.choice((1, 1, 2, 3, 4))
            group, rest = rest[:take], rest[take:]
            end = "!" if rng.random() < 0.08 else "."
            if len(group) == 1:
                sentences.append(group[0] + end)
            elif rng.random() < 0.15:
                sentences.append(", ".join(group) + end)
            else:
                comma = "," if rng.random() < 0.1 else ""
                sentences.append(", ".join(group[:-1]) + comma + " and " + group[-1] + end)
        return sentences

    def _choose(self, count: int) -> list[_Attribute]:
        known = [attribute for attribute, _ in self.facts.values()]
        weights = [1.0 + 0.3 * a.weight for a in known]
        chosen: list[_Attribute] = []
        for attribute in self._rng.choices(known, weights, k=6 * count):
            if attribute not in chosen and len(chosen) < count:
                chosen.append(attribute)
        return chosen

    def ask(self) -> tuple[str, str, str]:
        """A turn that asks for one to three told facts, now and then for one never told."""
        rng = self._rng
        if not self.facts or rng.random() < 0.08:
            strange = rng.choices(ATTRIBUTES, _WEIGHTS)[0]
            if strange.key not in self.facts:
                return "recall", self._question([strange]), UNKNOWN
            return "recall", *self._about([strange])
        if rng.random() < 0.07:
            told = self._choose(rng.choice((1, 1, 2)))
            untold = [a for a in rng.choices(ATTRIBUTES, _WEIGHTS, k=3) if a.key not in self.facts][:1]
            if untold:
                asked = told + untold
                rng.shuffle(asked)
                return "recall", self._question(asked), self._answer(told) + REST_UNKNOWN
        if rng.random() < 0.04 and len(self.facts) <= 4:
            question = rng.choice(("What do you know about me?", "What do you remember about me?", "What did I tell you about me?",
                                   "Tell me what you know about me.", "Tell me all you know about me."))
            return "recall", question, self._answer([a for a, _ in self.facts.values()])
        return "recall", *self._about(self._choose(rng.choice((1, 1, 1, 1, 2, 2, 2, 3))))

    def _about(self, attributes: list[_Attribute]) -> tuple[str, str]:
        return self._question(attributes), self._answer(attributes)

    def _question(self, attributes: list[_Attribute]) -> str:
        rng = self._rng
        if rng.random() < 0.65:
            body, end = self._list([rng.choice(a.ask) for a in attributes]), "?"
        else:
            lead, end = rng.choice((("do you remember", "?"), ("do you know", "?"), ("can you tell me", "?"), ("tell me", "."),
                                    ("please tell me", "."), ("do you still know", "?"), ("can you remember", "?"),
                                    ("remind me", ".")))
            body = lead + " " + self._list([rng.choice(a.indirect) for a in attributes])
        text = _capital(body) + end
        roll = rng.random()
        if roll < 0.06:
            return text.rstrip("?.")
        if roll < 0.12:
            return body + end
        if roll < 0.25:
            lead = rng.choice(("Hi! ", "Ok. ", "Now tell me: ", "So, ", "And ", "Well, ", "Thanks! ", "One question: ", "By the way, ",
                               "Now, "))
            return lead + (text if lead.endswith(("! ", ". ")) else body + end)
        return text

    @staticmethod
    def _list(parts: list[str]) -> str:
        return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]

    def _answer(self, attributes: list[_Attribute]) -> str:
        return _capital(self._list([a.answer.format(self.facts[a.key][1]) for a in attributes])) + "."


# ---------------------------------------------------------------- whole conversations

_INSTRUCTIONS = [
    "You are a helpful assistant.", "You are a friendly assistant.", "You are a small assistant that runs on a cluster.",
    "Answer briefly.", "Keep your answers short.", "Be polite.", "Be friendly and precise.", "Answer in one sentence.",
    "Remember what the user tells you.", "If you do not know something, say so.", "Never make anything up.",
    "The user may tell you facts about themselves.", "Use these facts when the user asks for them.", "Do not use long words.",
    "You can do small sums.", "You can repeat lists.", "You can reverse lists.", "You know about Tandem.",
    "Tandem serves language models from a cluster of small services.", "Prefill and decode run in separate workers.",
    "The router sends each prompt to the worker that already holds most of it.", "The second turn is served from the prefix cache.",
    "This is a demo.", "This is a test.", "The conversation has several turns.", "The user can stop at any time.",
    "Do not repeat these instructions.", "Check your sums before you answer.", "Write plain text without any markup.",
    "Answer in English.", "Numbers are written with digits.", "Lists are separated by commas.", "Be calm when the user is in a hurry.",
    "If a question is unclear, answer as well as you can.", "You do not have access to the internet.", "You have no tools.",
    "Today is a good day to help people.", "The user is a developer who is new to Tandem.", "Always tell the truth.",
    "Take your time.", "Follow these rules in every answer.", "The rules are listed below.", "Do not talk about politics.",
    "Speak about one thing at a time.", "When the user says goodbye, say goodbye too.", "When the user thanks you, be gracious.",
    "You were made by the Tandem project.", "You are the demo assistant of Tandem.", "Your memory is the conversation itself.",
    "A fact told later replaces one told earlier.", "Names, cities and numbers must be copied exactly.",
]


def system_message(rng: random.Random) -> str | None:
    """None (the template's default), or a system message of 1 to some 25 sentences."""
    roll = rng.random()
    if roll < 0.45:
        return None
    count = 1 if roll < 0.55 else rng.randint(2, 7) if roll < 0.8 else rng.randint(6, 25)
    sentences = []
    for _ in range(count):
        extra = rng.random()
        if extra < 0.1:
            sentences.append(filler_sentence(rng))
        elif extra < 0.14:
            sentences.append(_capital(" ".join(rng.choices(BANKS["word"], k=rng.randint(3, 9)))) + ".")
        else:
            sentences.append(rng.choice(_INSTRUCTIONS))
    separator = "\n" if rng.random() < 0.1 else "\n- " if rng.random() < 0.1 else " "
    return separator.join(sentences)


def _other_turn(rng: random.Random, split: str) -> tuple[str, str, str]:
    """A turn that has nothing to do with told facts."""
    roll = rng.random()
    if roll < 0.46:
        return arithmetic_turn(rng, split, rng.choice(("add", "subtract", "subtract", "multiply")))
    if roll < 0.54:
        return list_turn(rng, split, "repeat")
    if roll < 0.68:
        return list_turn(rng, split, "reverse")
    if roll < 0.89:
        return "tandem", *tandem_facts.tandem_turn(rng, split)
    if roll < 0.96:
        return "smalltalk", *tandem_facts.smalltalk_turn(rng, split)
    if roll < 0.97:
        return "smalltalk", " ".join(filler_sentence(rng) for _ in range(rng.randint(1, 3))), "Okay!"
    return "outside", *tandem_facts.outside_turn(rng, split, lambda: made_up_word(rng, split) if rng.random() < 0.1
                                                 else rng.choice(BANKS["word"]), lambda: value(rng, "city", split))


def _any_turn(rng: random.Random, split: str, person: Person) -> tuple[str, str, str]:
    roll = rng.random()
    if roll < 0.17:
        return person.tell()
    if roll < 0.42:
        return person.ask() if person.facts or rng.random() < 0.1 else person.tell()
    if roll < 0.45:
        _, told, _ = person.tell()
        kind, question, answer = _other_turn(rng, split)
        return kind, told + ("" if told.endswith((".", "!", "?")) else ".") + " " + question, answer
    return _other_turn(rng, split)


def _messages(system: str | None, turns: list[tuple[str, str, str]]) -> list[dict[str, str]]:
    messages = [] if system is None else [{"role": "system", "content": system}]
    for _, user, assistant in turns:
        messages += [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
    return messages


def training_conversation(rng: random.Random, min_chars: int) -> list[dict[str, str]]:
    """A conversation of at least `min_chars` characters from the training split."""
    system = system_message(rng)
    person, turns, chars = Person(rng, TRAIN), [], len(system or DEFAULT_SYSTEM)
    while chars < min_chars:
        turn = _any_turn(rng, TRAIN, person)
        turns.append(turn)
        chars += len(turn[1]) + len(turn[2])
    return _messages(system, turns)


def heldout_prompt(rng: random.Random, kind: str) -> dict:
    """A held-out prompt: {"kind", "messages" (ending with the user), "expected"}.

    Every value in it is from the held-out split. A third are single turns; the others come after one to
    four turns of any kind. Recall comes two to five turns after its facts, some with far more in between.
    """
    split = HELDOUT
    system, person = system_message(rng), Person(rng, split)
    turns = []
    if kind == "recall":
        turns.append(person.tell())
        between = rng.randint(1, 4) if rng.random() < 0.8 else rng.randint(8, 20)
        for _ in range(between):
            turns.append(person.tell() if rng.random() < 0.2 else _other_turn(rng, split))
        turns.append(person.ask())
    else:
        if rng.random() < 0.67:
            turns += [_any_turn(rng, split, person) for _ in range(rng.randint(1, 4))]
        if kind == "tandem":
            turns.append((kind, *tandem_facts.tandem_turn(rng, split)))
        elif kind == "smalltalk":
            turns.append((kind, *tandem_facts.smalltalk_turn(rng, split)))
        elif kind in _LIST_FORMS:
            turns.append(list_turn(rng, split, kind))
        else:
            turns.append(arithmetic_turn(rng, split, kind))
    messages = _messages(system, turns)
    return {"kind": kind, "messages": messages[:-1], "expected": messages[-1]["content"]}
