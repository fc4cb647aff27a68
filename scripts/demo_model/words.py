"""Word banks and random words for the synthetic conversations, and the train / held-out split.

A value (a name, a city, an operand pair, a list) belongs to exactly one split, decided by a hash of
its text alone, so training data made on the fly and the held-out prompts can never share one.
"""

import hashlib
import random
import string

TRAIN = "train"
HELDOUT = "heldout"


def split_of(key: str, one_in: int) -> str:
    """The split of `key`: held out for one key in `one_in`."""
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return HELDOUT if int.from_bytes(digest, "little") % one_in == 0 else TRAIN


_BANKS = {
    "name": """Ada Alan Alice Alma Amir Amy Anna Anders Andrea Aisha Arthur Astrid Barbara Ben Bella
        Bob Boris Bruno Carl Carla Carmen Cecil Chen Chloe Clara Claude Conrad Dana Daniel Dara David
        Dennis Diana Diego Dora Edith Edsger Eli Elena Emil Emma Erik Eva Fatima Felix Fiona Flora
        Frances Frank Gabriel George Grace Greta Gustav Hana Hannah Harald Hassan Hedy Helen Henry
        Hugo Ida Igor Ines Ingrid Iris Isaac Ivan Ivy Jack Jakob James Jana Jean Joan John Jonas Jorge
        Jose Judith Julia Kai Karen Karl Kate Katherine Ken Kim Klara Kofi Kurt Lars Laura Lea Leo Leon
        Lena Li Lily Linus Lisa Liu Louis Lucas Lucy Luis Lynn Mabel Maja Marco Margaret Maria Mark
        Marta Martin Mary Matteo Max Maya Mei Mia Michael Mila Mina Mona Nadia Nancy Naomi Nico Niels
        Nils Nina Noah Nora Olga Oliver Omar Oscar Otto Pablo Paul Paula Pedro Peter Petra Pia Priya
        Quentin Rachel Radia Rahul Rosa Raj Ray Rebecca Robert Robin Rohan Rolf Ruby Ruth Sam Samir Sana
        Sara Selma Sergei Shafi Sofia Sonia Stefan Stella Sue Susan Sven Tanja Tara Ted Teresa Theo Thomas
        Tim Tom Tony Uma Ursula Vera Victor Viola Vint Walter Wang Wendy Wei Will Xavier Yan Yara Yusuf
        Yuki Zara Zhang Zoe""",
    "city": """Hefei Beijing Shanghai Shenzhen Nanjing Chengdu Wuhan Tokyo Kyoto Osaka Seoul Busan Delhi
        Mumbai Pune Chennai Dubai Cairo Lagos Accra Nairobi Dakar Tunis Rabat Paris Lyon Nice Lille London
        Leeds Bristol Oxford Cambridge Dublin Cork Berlin Munich Hamburg Cologne Bonn Dresden Leipzig
        Vienna Graz Zurich Geneva Basel Bern Rome Milan Turin Naples Venice Madrid Seville Valencia Lisbon
        Porto Oslo Bergen Stockholm Malmo Uppsala Copenhagen Aarhus Helsinki Turku Tallinn Riga Vilnius
        Warsaw Krakow Gdansk Prague Brno Budapest Athens Sofia Zagreb Split Boston Chicago Denver Dallas
        Houston Seattle Portland Austin Miami Toronto Montreal Ottawa Calgary Vancouver Lima Quito Bogota
        Santiago Havana Brasilia Recife Sydney Melbourne Perth Brisbane Auckland Wellington Hanoi Manila
        Bangkok Jakarta Singapore Taipei Hangzhou Suzhou Qingdao Dalian Xiamen Reykjavik Utrecht Delft
        Ghent Antwerp Brussels Rotterdam Amsterdam""",
    "pet name": """Turing Rex Luna Milo Bello Felix Simba Nala Max Charlie Daisy Rocky Buddy Bella Coco
        Lola Ginger Pepper Shadow Smokey Tiger Oreo Biscuit Cookie Mochi Noodle Peanut Waffles Pumpkin
        Pixel Byte Kernel Lambda Tensor Euler Gauss Newton Curie Hopper Lovelace Dijkstra Ziggy Fluffy
        Snowball Patch Rusty Sparky Scout Ranger Hunter Bandit Duke Prince Duchess Rosie Poppy Willow
        Hazel Olive Clover Maple Jasper Onyx Amber Pearl Nemo Dory Gizmo Yoda Chewie Frodo Bilbo Merlin
        Hermes Apollo Athena Zeus""",
    "colour": """red blue green yellow orange purple pink brown black white grey teal cyan magenta indigo
        violet crimson scarlet turquoise gold silver beige maroon navy olive lime coral salmon lavender
        amber ivory khaki mint mustard peach plum rust sapphire emerald ruby""",
    "food": """pizza pasta sushi ramen noodles dumplings rice|fried rice|curry|soup|salad|bread|cheese|
        tacos|burritos|pancakes|waffles|lasagne|risotto|paella|falafel|hummus|kebab|goulash|stew|
        chocolate|ice cream|apple pie|mashed potatoes|baked beans|fish and chips|tofu|kimchi|bibimbap|
        pho|dosa|samosas|biryani|spring rolls|hot pot|roast duck|meatballs|porridge|omelettes|popcorn|
        gnocchi|ravioli|sauerkraut|pretzels|croissants|baguettes|burgers|chilli|couscous|tiramisu""",
    "drink": """tea coffee water milk lemonade cocoa|green tea|black tea|orange juice|apple juice|cola|
        ginger beer|iced tea|espresso|cappuccino|oat milk|soda|cider|mint tea|hot chocolate|mango lassi|
        tomato juice|tonic water|root beer|jasmine tea""",
    "fruit": """apple pear plum cherry banana mango kiwi lemon lime orange grape peach apricot melon papaya
        fig date guava lychee quince raspberry strawberry blueberry pineapple pomegranate""",
    "animal": """cat dog horse otter panda tiger lion wolf fox bear elephant giraffe zebra whale dolphin
        penguin owl eagle falcon crow sparrow turtle frog lizard snake koala kangaroo badger hedgehog seal
        octopus crab camel donkey goat sheep moose beaver squirrel hamster""",
    "sport": """tennis football chess running swimming cycling rowing sailing climbing skiing judo karate
        boxing golf hockey rugby cricket baseball basketball badminton volleyball archery fencing surfing
        skating darts handball curling""",
    "season": """spring summer autumn winter""",
    "planet": """Mercury Venus Earth Mars Jupiter Saturn Uranus Neptune""",
    "flower": """rose tulip lily daisy orchid iris poppy lotus jasmine violet sunflower peony dahlia
        marigold lavender magnolia""",
    "language": """Python Rust Java Kotlin Swift Ruby Perl Haskell Erlang Go Lua Julia Scala Fortran Cobol
        Lisp Scheme Ada Pascal Prolog Zig OCaml""",
    "job": """a nurse|a teacher|an engineer|a doctor|a baker|a farmer|a pilot|a driver|a lawyer|a chemist|
        a painter|a plumber|a cook|a writer|a singer|an actor|an architect|an artist|a biologist|a carpenter|
        a dentist|an editor|an electrician|a gardener|a judge|a librarian|a mechanic|a musician|a photographer|
        a physicist|a programmer|a sailor|a scientist|a student|a surgeon|a tailor|a translator|a waiter""",
    "month": """January February March April May June July August September October November December""",
    "word": """apple anchor arrow autumn badge bag ball bamboo banana basket beach bell bench bicycle bird
        blanket boat book bottle bowl box brick bridge broom brush bucket button cable cake camera candle
        canoe canvas card carpet castle chair chalk cheese cherry circle clock cloud coat coin comb copper
        cotton cup curtain desk diamond door dragon drawer dress drum eagle earth egg engine envelope
        feather fence field fire flag flower flute forest fork fountain fox frame garden gate ghost glass
        globe glove goat grass guitar hammer harbour hat heart hill honey horn horse house ice ink iron
        island jacket jar jewel kettle key kite knife ladder lake lamp lantern leaf lemon letter lion lock
        magnet map marble market mask meadow medal mirror moon mountain mouse mushroom music nail needle
        nest net night oak ocean onion orange oven owl paint palace paper parrot path pear pearl pen pencil
        pepper piano picture pillow pin pine pipe planet plate plum pocket pond potato prince purse puzzle
        queen quilt rabbit radio rain ribbon rice ring river road robot rocket roof room root rope rose
        sail salt sand scarf school scissors sea seed shell ship shirt shoe silk silver sky sled snow soap
        sock soup spade spider spoon spring square stair star stone storm straw street string sugar suit
        sun swan sword table tea tent thread thunder ticket tiger tower train tree trumpet tulip tunnel
        turtle umbrella valley vase village violin wagon wall watch water wave wheel whistle wind window
        wing winter wolf wood wool yard zebra""",
    "adjective": """red blue old young tall short small large quiet loud happy sad warm cold bright dark
        heavy light new strange famous empty full round broken clean simple early late slow quick""",
    "verb": """stands waits sleeps sings moves turns falls grows shines stops begins rests runs works stays
        plays hides looks walks travels""",
}


def _parse(text: str) -> list[str]:
    """Words are separated by blanks; once a '|' was met, entries are separated by '|' alone."""
    head, bar, tail = text.partition("|")
    if not bar:
        return text.split()
    if head.strip().startswith(("a ", "an ")):
        return [" ".join(part.split()) for part in text.split("|") if part.strip()]
    return head.split() + [" ".join(part.split()) for part in tail.split("|") if part.strip()]


BANKS = {kind: list(dict.fromkeys(_parse(text))) for kind, text in _BANKS.items()}
_VALUE_ONE_IN = 6
_BANK_SPLIT = {
    (kind, split): [w for w in words if split_of(w.lower(), _VALUE_ONE_IN) == split]
    for kind, words in BANKS.items()
    for split in (TRAIN, HELDOUT)
}

_ALL_WORDS = [word for kind, split in _BANK_SPLIT if split == TRAIN for word in _BANK_SPLIT[kind, split]]
_ONSETS = (
    "b c d f g h j k l m n p r s t v w z br ch cl cr dr fl fr gl gr kl kr pl pr sh sk sl sn sp st th tr qu "
    "y x"
).split()
_VOWELS = "a e i o u a e i o u ai au ea ee ei ia ie io oa oo ou y".split()
_CODAS = ["", "", "", "n", "r", "s", "l", "m", "t", "k", "d", "x", "ng", "ck", "sh", "nd", "rt", "th", "p", "b"]
_ACCENTED = "éèêëáàâäåãæçíìîïñóòôöøõúùûüýßšžčćłęąőğışАБВГДЕЖЗабвгдежзиклмнопрстαβγδελμνπστ北京上海合肥天地人山水火木金土"


def _made_up(rng: random.Random) -> str:
    style = rng.random()
    if style < 0.30:
        return "".join(
            rng.choice(_ONSETS) + rng.choice(_VOWELS) + rng.choice(_CODAS) for _ in range(rng.randint(1, 3))
        )
    if style < 0.80:  # The front of one word and the back of another: every piece turns up after any other.
        front, back = rng.choice(_ALL_WORDS), rng.choice(_ALL_WORDS)
        return (front[: rng.randint(1, len(front))] + back[rng.randrange(len(back)) :]).replace(" ", "").lower()
    if style < 0.94:
        return "".join(rng.choices(string.ascii_lowercase, k=rng.randint(2, 8)))
    word = _made_up(rng)
    at = rng.randrange(len(word) + 1)
    return word[:at] + rng.choice(_ACCENTED) + word[at + rng.randint(0, 1):]


def made_up_word(rng: random.Random, split: str) -> str:
    """A random word of `split` that no bank need hold: teaches copying of any spelling."""
    while True:
        word = _made_up(rng)
        if split_of(word.lower(), _VALUE_ONE_IN) == split:
            return word


CAPITALISED = ("name", "city", "pet name", "planet", "month", "language")


def value(rng: random.Random, kind: str, split: str) -> str:
    """A random value of `kind`: mostly from its bank, else made up."""
    bank = _BANK_SPLIT[kind, split]
    if bank and rng.random() < 0.7:
        return rng.choice(bank)
    word = made_up_word(rng, split)
    if kind in ("name", "city", "food", "drink", "job") and rng.random() < 0.25:
        word += " " + (made_up_word(rng, split) if rng.random() < 0.5 else rng.choice(_BANK_SPLIT["word", split]))
    if kind in CAPITALISED:
        return " ".join(part[0].upper() + part[1:] for part in word.split(" "))
    if kind == "job":
        return ("an " if word[0] in "aeiou" else "a ") + word
    return word


def number(rng: random.Random, split: str, max_digits: int = 4) -> str:
    """A random whole number of `split`, its digit count uniform."""
    while True:
        digits = rng.randint(1, max_digits)
        text = str(rng.randint(10 ** (digits - 1) if digits > 1 else 0, 10**digits - 1))
        if split_of("number " + text, _VALUE_ONE_IN) == split:
            return text
