"""text: orders, dates and support tickets as procedural text.

The text is pure Python and seeded, without data files or downloads. The bundled base is pretrained on `document`s,
which show the same facts in many shapes, but never in the shape of an instruction.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from random import Random

ONSETS = "b br c ch d dr f g gr h j k l m n p pr r s sh st t tr v w z".split()
VOWELS = "a e i o u ai ea ou".split()
CODAS = ["", "", "n", "r", "l", "s", "m", "t", "nd", "rt"]
FIRST_NAMES = (
    "Ana Ben Carla David Emma Felix Grace Hugo Irene James Karen Leo Maria Nina Oscar Paula Quinn Rosa Sam Tara "
    "Umar Vera Walter Xenia Yusuf Zoe Adam Bella Chris Diana Ethan Fiona George Helen Ivan Julia Kevin Laura "
    "Martin Nora Oliver Petra Robert Sara Thomas Ursula Victor Wendy"
).split()
LAST_NAMES = (
    "Silva Brown Costa Davies Evans Fischer Garcia Hughes Ito Jensen Khan Lopez Meyer Novak Owens Patel Quist "
    "Rossi Smith Tanaka Unger Vargas Wilson Xu Young Zhang Adams Bauer Clark Duarte Ellis Foster Gomez Hansen "
    "Ibsen Jones Kowal Larsen Moore Nunes Okafor Pereira Reyes Schmidt Turner Ueda Vogel Weber Yilmaz Ziegler "
    "Baker Carter Dixon Ferrari Green Harris Klein Lambert Mason Nguyen Ortiz Parker Romano Santos"
).split()
CITIES = (
    "Porto London Paris Madrid Berlin Oslo Vienna Prague Dublin Athens Lisbon Warsaw Geneva Milan Turin Naples "
    "Hamburg Munich Leeds Bristol York Cardiff Lyon Nice Bilbao Seville Malaga Zurich Basel Bergen Aarhus Turku "
    "Tampere Riga Vilnius Krakow Gdansk Brno Graz Linz Split Zagreb Sofia Varna Cork Galway Delft Utrecht Ghent "
    "Bruges"
).split()
ITEMS = (
    "lamp chair desk kettle carpet mirror shelf clock pillow blanket teapot vase bench stool drawer ladder bucket "
    "basket candle frame mug plate spoon towel curtain rug sofa bin jar tray"
).split()
COLOURS = "red blue green white black grey yellow brown pink silver".split()
MONTHS = "January February March April May June July August September October November December".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
REAL_NAME_SHARE = 0.85  # the rest is invented, so that the model must copy names instead of remembering them

ORDER_SENTENCES = [
    "{customer} from {city} would like {quantity} {colour} {goods} by {day}.",
    "Please send {quantity} {colour} {goods} to {customer} in {city} before {day}.",
    "{customer} ordered {quantity} {colour} {goods}, deliver to {city} on {day}.",
    "We need {quantity} {colour} {goods} in {city} by {day}, the buyer is {customer}.",
    "Hello, this is {customer}. Could I get {quantity} {colour} {goods} in {city} on {day}?",
    "On {day} please ship {quantity} {colour} {goods} to {city} for {customer}.",
    "{quantity} {colour} {goods} for {customer}, {city}, {day}.",
    "My name is {customer} and I want {quantity} {colour} {goods} sent to {city} by {day}.",
]
FIELD_WORDS = {
    "customer": ["customer", "name", "client", "buyer"],
    "item": ["item", "product", "article"],
    "quantity": ["quantity", "count", "qty", "number"],
    "colour": ["colour", "shade"],
    "city": ["city", "town", "destination"],
    "day": ["day", "date", "due"],
}
TICKETS = {
    "billing": [
        "I was charged twice for {thing}",
        "the invoice for {thing} is wrong",
        "I want a refund for {thing}",
        "my card was declined when paying for {thing}",
    ],
    "shipping": [
        "my parcel with {thing} has not arrived",
        "the courier lost {thing}",
        "when will {thing} be delivered",
        "the tracking page for {thing} is empty",
    ],
    "returns": [
        "{thing} arrived broken, I want to send it back",
        "{thing} is the wrong size, how do I return it",
        "please collect {thing} from me, I changed my mind",
        "I need a label to post {thing} back",
    ],
    "account": [
        "I cannot log in to see {thing}",
        "my password reset mail never came",
        "please change the email on my account",
        "the app signs me out when I open {thing}",
    ],
}


@dataclass(frozen=True, slots=True)
class Order:
    """Hold one order.

    `goods` is the item's name behind its quantity.
    """

    customer: str
    item: str
    quantity: int
    colour: str
    city: str
    day: str

    @property
    def goods(self) -> str:
        plural = "es" if self.item.endswith(("sh", "ch")) else "s"
        return self.item if self.quantity == 1 else self.item + plural

    def fields(self) -> dict[str, str | int]:
        return {name: getattr(self, name) for name in FIELD_WORDS}


@dataclass(frozen=True, slots=True)
class Ticket:
    """Hold one support ticket, with its queue and its customer."""

    text: str
    queue: str
    customer: str


def invented_word(random: Random, least: int = 2, most: int = 3) -> str:
    """Return a pronounceable capitalized word of `least` to `most` syllables."""
    syllables = [
        random.choice(ONSETS) + random.choice(VOWELS) + random.choice(CODAS) for _ in range(random.randint(least, most))
    ]
    return "".join(syllables).capitalize()


def person(random: Random) -> str:
    if random.random() < REAL_NAME_SHARE:
        return f"{random.choice(FIRST_NAMES)} {random.choice(LAST_NAMES)}"
    return f"{invented_word(random, 1, 2)} {invented_word(random, 2, 2)}"


def town(random: Random) -> str:
    return random.choice(CITIES) if random.random() < REAL_NAME_SHARE else invented_word(random, 2, 2)


def order(random: Random) -> Order:
    return Order(
        customer=person(random),
        item=random.choice(ITEMS),
        quantity=random.randint(1, 99),
        colour=random.choice(COLOURS),
        city=town(random),
        day=random.choice(DAYS),
    )


def order_sentence(random: Random, placed: Order) -> str:
    return random.choice(ORDER_SENTENCES).format(goods=placed.goods, **placed.fields())


def order_listing(random: Random, placed: Order) -> str:
    """Return some of an order's fields, shuffled, in one of six notations."""
    fields = list(placed.fields().items())
    random.shuffle(fields)
    pairs = [(random.choice(FIELD_WORDS[name]), value) for name, value in fields[: random.randint(1, len(fields))]]
    notations = [
        lambda: "\n".join(f"{name}: {value}" for name, value in pairs),
        lambda: json.dumps(dict(pairs)),
        lambda: "; ".join(f"{name}={value}" for name, value in pairs),
        lambda: ",".join(name for name, _ in pairs) + "\n" + ",".join(str(value) for _, value in pairs),
        lambda: " ".join(f"The {name} is {value}." for name, value in pairs),
        lambda: "\n".join(f"- {name} | {value}" for name, value in pairs),
    ]
    return random.choice(notations)()


def date(random: Random) -> tuple[int, int, int]:
    """Return (year, month, day of month)."""
    return random.randint(1990, 2039), random.randint(1, 12), random.randint(1, 28)


def date_forms(year: int, month: int, day: int) -> list[str]:
    """Return the six written forms of a date; the third is ISO 8601."""
    suffix = "th" if 10 < day < 20 else {1: "st", 2: "nd", 3: "rd"}.get(day % 10, "th")
    name = MONTHS[month - 1]
    return [
        f"{day} {name} {year}",
        f"{name} {day}, {year}",
        f"{year}-{month:02d}-{day:02d}",
        f"{day:02d}/{month:02d}/{year}",
        f"the {day}{suffix} of {name} {year}",
        f"{name[:3]} {day}{suffix} {year}",
    ]


ISO_FORM = 2


def ticket(random: Random) -> Ticket:
    queue, placed = random.choice(list(TICKETS)), order(random)
    thing = f"{random.choice(['the', 'my'])} {placed.colour} {placed.item}"
    text = random.choice(TICKETS[queue]).format(thing=thing)
    return Ticket(text[0].upper() + text[1:], queue, placed.customer)


def document(random: Random) -> str:
    """Return one pretraining document.

    It is an order with its listings, a date in four forms, a ticket, or repeated words.
    """
    share = random.random()
    if share < 0.60:
        placed = order(random)
        listings = [order_listing(random, placed) for _ in range(random.randint(1, 3))]
        return "\n".join([order_sentence(random, placed), *listings])
    if share < 0.74:
        return " = ".join(random.sample(date_forms(*date(random)), 4))
    if share < 0.82:
        filed = ticket(random)
        about = f"{filed.text}. This is a {filed.queue} question from {filed.customer}."
        return about if random.random() < 0.5 else f"{filed.queue}: {filed.text[0].lower()}{filed.text[1:]}"
    return _repeated_words(random)


def _repeated_words(random: Random) -> str:
    # the tasks need copying, which a line repeated two or three times teaches
    known = FIRST_NAMES + LAST_NAMES + CITIES + ITEMS + COLOURS + MONTHS + DAYS
    words = []
    for _ in range(random.randint(5, 14)):
        if random.random() < 0.7:
            words.append(random.choice(known))
        else:
            words.append(invented_word(random) if random.random() < 0.5 else str(random.randint(0, 99)))
    return "\n".join([" ".join(words)] * random.randint(2, 3))
